"""What stands between the losses of a step and the weights.  The rules, none of which waits for the host:

    not finite   a loss, a derivative or a coefficient is NaN or infinite                              skipped
    explosion    a loss > explosion * max(1, a), a the mean of steps' largest loss (about 50 steps)    skipped
    overflow     fp16 weights: sum |coef| * largest scale * 6.76 > half of their range, 32,752         skipped
    clip         |g| > clip, g the step's projected gradient: every coefficient times clip / |g|       clipped
    flat         all losses are equal, g = 0: nothing moves, the losses do not resolve eps             counted
    too many     the running share of skipped steps over about 50 > max_skipped                        the run stops

A skipped step leaves weights, states and the method's memory as they were, takes no decay, and is not in the mean.
6.76 is the largest normal of the noise contract; rules with a state (Adam) move by their rate, so their coefficients,
estimates of a gradient, need only be finite.  That a run has to stop is seen one step late, from numbers that were sent
without waiting; 35 skipped steps in a row reach a share of one half.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zo_finetuner.errors import UnstableRun, require_not_negative
from zo_finetuner.optim.base import Update
from zo_finetuner.optim.directions import Terms

logger = logging.getLogger(__name__)

MEMORY = 50  # steps, of both running means
LARGEST = 6.76  # of a normal, in sigma
COUNTED = ("skipped", "exploded", "clipped", "flat")


@dataclass(frozen=True)
class Limits:
    """clip, explosion: 0 for none.  max_skipped: share of recent steps, 1 for a run that never stops.  InputError for
    what is negative or not finite."""

    clip: float = 0.0
    explosion: float = 10.0
    max_skipped: float = 0.5

    def __post_init__(self) -> None:
        for name in ("clip", "explosion", "max_skipped"):
            require_not_negative(name, getattr(self, name))


class Guard:
    """dtypes: of the weights.  slopes: every second number that a step evaluates is a derivative.

    state: all that it remembers, fp64 on the device: the counts; then running means, each (1 - 1/50) of what it was and
    1/50 of the step's: of skipped (share), of largest losses (level) and of steps that were taken (taken), so that the
    mean of the largest loss is level / taken from the first step on."""

    def __init__(self, limits: Limits, dtypes: Iterable[torch.dtype], slopes: bool, device: torch.device):
        self.limits, self.slopes = limits, slopes
        self.reach = min(torch.finfo(dtype).max for dtype in dtypes) / 2
        counts, means = len(COUNTED), 3
        self.state = torch.zeros(counts + means, dtype=torch.float64, device=device)
        self.counts = self.state[:counts]
        self.share, self.level, self.taken = self.state[counts:].unbind()
        self._keep = torch.tensor([1.0] * counts + [1 - 1 / MEMORY] * means, dtype=torch.float64, device=device)
        self._gain = torch.tensor([1.0] * counts + [1 / MEMORY] * means, dtype=torch.float64, device=device)
        self._never = torch.zeros((), dtype=torch.bool, device=device)
        self._copy = torch.zeros(len(self.state), dtype=torch.float64, pin_memory=device.type == "cuda")
        self._host = self._copy.numpy()  # read without an operator of torch
        self._told = (0, 0)  # skipped and exploded steps that the log has

    def judge(self, update: Update, numbers: Tensor) -> tuple[Update, Tensor]:
        """The update with its coefficients clipped, and whether it may be applied (0-dim bool); counts the step.
        numbers: all that it has evaluated, fp32."""
        low, high = numbers.aminmax()  # NaN if one is
        spread = high - low
        ok = (spread < torch.inf) & self._fits(update)
        if self.slopes:
            high = numbers[::2].amax()
        exploded = self._never
        if self.limits.explosion:  # both sides times `taken`: before the first step there is no explosion
            exploded = ok & (high * self.taken > self.limits.explosion * torch.maximum(self.taken, self.level))
            ok = ok ^ exploded
        update, clipped = self._clip(update)
        skipped = ~ok
        seen = (skipped, exploded, clipped & ok, ok & (spread == 0), skipped, torch.where(ok, high, 0.0), ok)
        self.state.mul_(self._keep).addcmul_(self._gain, torch.stack(seen))
        return update, ok

    def _fits(self, update: Update) -> Tensor:
        """Whether the coefficients are finite, and the move stays within the weights' dtype."""
        reach = self.reach / LARGEST if update.by is None else torch.finfo(torch.float32).max
        fits = self._size(update.terms) <= reach
        return fits if update.mean is None else fits & torch.isfinite(self._size(update.mean[1]))

    def _size(self, terms: Terms) -> Tensor:
        """sum |coef| * largest scale, the scales only where 16 bits could overflow."""
        if not terms:
            return torch.zeros_like(self.share)
        size = terms[0][1].abs() if len(terms) == 1 else torch.stack([coef for _, coef in terms]).abs().sum()
        scales = {getattr(direction, "scale", None) for direction, _ in terms} - {None}  # compared by identity
        if scales and self.reach < 1e30:
            size = size * torch.stack([scale.abs().amax() for scale in scales]).amax()
        return size

    def _clip(self, update: Update) -> tuple[Update, Tensor]:
        clip = self.limits.clip
        if not clip:
            return update, self._never
        size = update.projected_grad.abs()
        clipped = size > clip
        share = torch.where(clipped, clip / size, 1.0)
        return replace(update, terms=[(direction, coef * share) for direction, coef in update.terms]), clipped

    @property
    def skipped(self) -> Tensor:
        """How many steps were skipped, 0-dim fp64."""
        return self.counts[0]

    def send(self) -> None:
        """After a step: its numbers go to the host, without waiting."""
        self._copy.copy_(self.state, non_blocking=True)

    def report(self, step: int) -> None:
        """Before step `step`: tells of steps that were skipped (of the 1st, 2nd, 4th, 8th, ...), from the numbers that
        have arrived.  Raises UnstableRun when they were too many."""
        skipped, exploded = int(self._host[0]), int(self._host[1])
        if skipped.bit_length() > self._told[0].bit_length():
            why = "exploded" if exploded > self._told[1] else "was not finite, or its step too large"
            logger.warning("step %d was skipped: a loss %s (%d so far)", step - 1, why, skipped)
        self._told = (skipped, exploded)
        if self._host[len(COUNTED)] > self.limits.max_skipped:
            self.share.zero_()  # who goes on after this has another 35 steps
            self.send()
            if self.state.is_cuda:  # copies that are still under way would bring the old share back
                torch.cuda.current_stream(self.state.device).synchronize()
            raise UnstableRun(
                f"stopped before step {step}: more than {self.limits.max_skipped:.0%} of the last steps were skipped "
                f"({skipped} in all, {exploded} of them since a loss exploded, the others not finite); the weights are "
                f"those before: lower lr or eps, or load the model in another dtype"
            )

    def metrics(self) -> dict[str, Tensor]:
        return {f"{name}_steps": self.counts[number] for number, name in enumerate(COUNTED)}

    def load(self, state: Tensor) -> None:
        """A run that had stopped is given another chance: its share of skipped steps starts at 0."""
        self.state.copy_(state)
        self.share.copy_(torch.where(self.share > self.limits.max_skipped, 0.0, self.share))
        self.send()
        self._told = (int(self.state[0]), int(self.state[1]))
