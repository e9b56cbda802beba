"""The ask/tell contract between methods and the engine.

A method never touches a weight.  It names directions by small descriptions, asks for losses at theta + coef * scale *
z, and answers with the coefficients of an update.  The engine owns weights, noise and forwards.

    start(blocks)   once: what it keeps is allocated
    ask(context)    -> [Probe, ...]
    tell(losses)    -> Update, or another [Probe, ...] for methods of several rounds

Everything numeric is a tensor on the device, so a method costs the step no wait for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from zo_finetuner.errors import InputError
from zo_finetuner.optim.directions import Anchored, Combination, Direction, Stacked, Terms
from zo_kernels import Blocks, BlockStats

__all__ = ["Combination", "Direction", "Method", "Part", "Probe", "RuleStep", "Slope", "StepContext", "Update"]


@dataclass(frozen=True, eq=False)
class Probe:
    """Evaluate the loss at theta + coef * direction; direction None: at theta.  coef: 0-dim fp32."""

    direction: Direction | Combination | Anchored | None
    coef: Tensor | None = None

    @property
    def terms(self) -> Terms:
        """Of a Direction or a Combination."""
        if isinstance(self.direction, Combination):
            return [(direction, self.coef * weight) for direction, weight in self.direction.terms]
        return [(self.direction, self.coef)]

    @cached_property
    def stacked(self) -> Stacked:
        return Stacked.of(self.terms)


@dataclass(frozen=True, eq=False)
class Slope:
    """Evaluate the loss at theta and its derivative along the direction, exactly: two numbers (`tangent.py`)."""

    direction: Direction


@dataclass(frozen=True)
class RuleStep:
    """An update by one of `zo_kernels.RULES`: its states (for each a tensor per block) and numbers."""

    rule: str
    states: list[list[Tensor]]
    numbers: Tensor


@dataclass(frozen=True)
class Update:
    """theta += sum coef * direction over `terms` (one distribution and form); with `by`, what its rule makes of the
    terms, whose coefficients are then an estimate of the gradient.

    loss: what the step reports as the training loss (0-dim fp32); projected_grad: (l+ - l-) / 2 eps, for the logs.
    mean: a direction policy's mean and its own terms, among which are the directions of `terms`, without the mean; it
    moves from what `terms` were made with.  anchored: instead of terms, theta moves as it says at coefficient 0."""

    terms: Terms
    loss: Tensor
    projected_grad: Tensor
    by: RuleStep | None = None
    mean: tuple[Blocks, Terms] | None = None
    anchored: Anchored | None = None


@dataclass(frozen=True)
class StepContext:
    """What a method may look at.  step: number from 0, None where the step is captured into a CUDA graph; lr, eps:
    0-dim fp32 on the device; seed: number of a direction, below the method's `directions` -> its seed (0-dim int64,
    good until the next step); block_stats: () -> `zo_kernels.BlockStats` of the unperturbed weights (one read)."""

    step: int | None
    lr: Tensor
    eps: Tensor
    seed: Callable[[int], Tensor]
    block_stats: Callable[[], BlockStats]


@dataclass
class Part:
    """A piece of a method, or a method.  Its fields with a number or a text for a default are its settings.

    memory: small tensors kept from step to step.  The engine gives them back after a skipped step.
    states: for each name a tensor per block, written by kernels, which leave them alone in a skipped step.
    Both are made in `start` and written in place: a step that was captured into a CUDA graph goes on where the one
    before ended, and no number that changes is kept on the host."""

    memory: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    states: dict[str, list[Tensor]] = field(default_factory=dict, init=False, repr=False)

    def start(self, blocks: Blocks) -> None:
        """Make what is kept for these blocks, on their device.  Raises InputError where it does not fit."""


@dataclass
class Method(Part):
    """Base of all methods.  forwards: losses that a step asks for, pairs: how many pairs of them are of one direction
    with both signs; directions: seeds that it needs.

    slopes: it asks for derivatives (`Slope`) and not for probes; each counts as two forwards.

    scratch_only: why its probes cannot be made in place, "" where they can.
    whole_only: why it cannot work on pieces of tensors (`shards.py`), "" where it can.
    low_rank: its directions have subspaces: its probes are side products (`lowrank.py`), made in no other way.
    factor_bytes: of its subspace and of what is collected in it, at the most.
    fixed: parts of which it leaves no choice (`settings.py`), with the reasons.
    uniform: every step asks for the same probes (a captured step may stand for all).
    metrics: numbers of the last step for the logs, 0-dim; "sigma": (blocks,), the scale of every block.
    recipe: what `make_method` made it of (JSON), for a journal; empty for one made by hand."""

    name = "method"
    forwards = 0
    pairs = 0
    directions = 1
    slopes = False
    scratch_only = ""
    whole_only = ""
    low_rank = False
    fixed: ClassVar[dict[str, str]] = {}
    factor_bytes = 0
    uniform = True
    metrics: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    recipe: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def ask(self, context: StepContext) -> list[Probe] | list[Slope]:
        raise NotImplementedError

    def tell(self, losses: Tensor) -> Update | list[Probe]:
        """losses: (probes,) fp32 in the order asked."""
        raise NotImplementedError

    def turns(self, step: int) -> bool:
        """Whether `turn` is to be called before this step is asked: what is seldom done, and never in a graph."""
        return False

    def turn(self, context: StepContext) -> None:
        """Make for the steps to come what several share (a subspace).  All updates are in the weights."""

    def prepare(self, blocks: Blocks) -> None:
        """`start` for these blocks, unless that is done.  What is made of weights is made of them as they are now."""
        place = (blocks.names, blocks.addresses, blocks.device)
        if self.__dict__.get("_place") != place:
            self.__dict__["_place"] = place
            self.start(blocks)

    def kept(self) -> dict[str, Tensor]:
        """Everything in memory, of parts too."""
        return dict(self.memory)

    def release(self) -> None:
        """Free what it keeps for every weight, whoever still holds it.  No step can follow."""
        for kept in self.state_dict().values():
            for tensor in kept if isinstance(kept, list) else []:
                tensor.untyped_storage().resize_(0)

    def state_dict(self) -> dict[str, Any]:
        return {**self.kept(), **self.states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        mine = self.state_dict()
        if state.keys() != mine.keys():
            raise InputError(f"cannot resume: the run's {self.name} kept {', '.join(sorted(state)) or 'nothing'}, this "
                             f"one keeps {', '.join(sorted(mine)) or 'nothing'}: give the run's settings")
        for name, value in mine.items():
            pairs = zip(value, state[name], strict=True) if isinstance(value, list) else [(value, state[name])]
            for own, saved in pairs:
                own.copy_(saved)
