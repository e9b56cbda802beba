"""Estimators: from a few losses to an estimate of the gradient, sum_k g_k d_k along the directions d_k.

    central     d_k = z_k:  g_k = (f(theta + eps z_k) - f(theta - eps z_k)) / (2 eps N)               SPSA, n-SPSA
    one-sided   g_k = (f(theta + eps z_k) - b) / (eps N)         b = f(theta), or the mean of the other probes
                with spread: g_k = (f_k - b) / (std(f) N)        b = f(theta), or the mean of all
    slope       g_k = <gradient, z_k> / N, exact                 (`forward_grad.py`)
    guided, bayesian, conservative                 (`guided.py`, `bayesian.py`, `conservative.py`)

Expectations: central and one-sided estimate the gradient of a cubic and of a quadratic without bias, slope that of any
function (scales s_b: s_b^2 times it).  Of a linear one their squared error is (d + 1) / N of the squared gradient for
normal z and (d - 1) / N for random signs; with the mean of the others for a baseline, (d + 1) / (N - 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zo_finetuner.errors import InputError
from zo_finetuner.optim.base import Part, Probe, Slope, StepContext
from zo_finetuner.optim.directions import Direction, Terms


@dataclass(frozen=True)
class Estimate:
    """terms: (direction, g) pairs.  loss: the step's; projected_grad: for the log; pair: two losses for a policy."""

    terms: Terms
    loss: Tensor
    projected_grad: Tensor
    pair: Tensor

    @classmethod
    def of(cls, terms: Terms, loss: Tensor, projected_grad: Tensor | None = None, pair: Tensor | None = None):
        if projected_grad is None:
            projected_grad = torch.stack([g for _, g in terms]).norm()
        return cls(terms, loss, projected_grad, torch.stack((loss, loss)) if pair is None else pair)


@dataclass
class Estimator(Part):
    """probes: directions of a step.  directions: seeds that they take; forwards, pairs, slopes: as of a Method.
    only_sgd: why no other rule goes with it, "" where all do."""

    probes: int = 1

    pairs = 0
    slopes = False
    only_sgd = ""

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise InputError(f"probes must be at least 1, got {self.probes}")

    @property
    def directions(self) -> int:
        return self.probes

    @property
    def forwards(self) -> int:
        return self.probes

    def ask(self, directions: list[Direction], context: StepContext) -> list[Probe] | list[Slope]:
        raise NotImplementedError

    def tell(self, losses: Tensor) -> Estimate | list[Probe]:
        raise NotImplementedError


@dataclass
class Central(Estimator):
    """Pairs of probes, two forwards each."""

    @property
    def forwards(self) -> int:
        return 2 * self.probes

    @property
    def pairs(self) -> int:
        return self.probes

    def ask(self, directions: list[Direction], context: StepContext) -> list[Probe]:
        self._directions, self._eps = directions, context.eps
        return [Probe(direction, eps) for direction in directions for eps in (context.eps, -context.eps)]

    def tell(self, losses: Tensor) -> Estimate:
        plus, minus = losses.view(-1, 2).unbind(1)
        g = (plus - minus) / (2 * self._eps)
        if self.probes == 1:
            return Estimate.of([(self._directions[0], g[0])], losses.mean(), g[0], losses)
        g = g / self.probes
        return Estimate.of(list(zip(self._directions, g, strict=True)), losses.mean(), pair=losses[:2])


@dataclass
class OneSided(Estimator):
    """A forward for each of N probes, and one for the centre where that is the baseline.  With the mean of the others
    as baseline (leave-one-out, RLOO) no forward is spent on it, and the average is over N - 1.  spread: divide by the
    standard deviation of the N losses instead of eps (FZOO; evolution strategies), zero where that is zero."""

    probes: int = 8
    baseline: str = "center"
    spread: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline not in ("center", "mean"):
            raise InputError(f'baseline must be "center" or "mean", got "{self.baseline}"')
        if self.probes < 2 and (self.spread or self.baseline == "mean"):
            why = "the baseline of a probe is the mean of the others" if self.baseline == "mean" else (
                "the losses of one probe have no spread")
            raise InputError(f"probes must be at least 2, got {self.probes}: {why}")

    @property
    def forwards(self) -> int:
        return self.probes + (self.baseline == "center")

    def ask(self, directions: list[Direction], context: StepContext) -> list[Probe]:
        self._directions, self._eps = directions, context.eps
        center = [Probe(None)] if self.baseline == "center" else []
        return center + [Probe(direction, context.eps) for direction in directions]

    def tell(self, losses: Tensor) -> Estimate:
        moved = losses[-self.probes :]
        base = losses[0] if self.baseline == "center" else moved.mean()
        above = moved - base
        if self.spread:
            g = ratio(above, self.probes * moved.std(correction=0))
        else:
            g = above / (self._eps * (self.probes - (self.baseline == "mean")))
        return Estimate.of(list(zip(self._directions, g, strict=True)), base)


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """0 where the denominator is 0: losses without a spread say nothing about a direction."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)
