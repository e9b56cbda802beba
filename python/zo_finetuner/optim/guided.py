"""MeZO-GV: two-point estimates along the difference of a good and a bad direction (guided by losses), and Greedy.

    f_k = f(theta + eps z_k) for the seed kept from the step before and candidates - 1 new ones
    v   = z_best - z_worst   (greedy: z_best);   g = (f(theta + eps v) - f(theta - eps v)) / 2 eps;   gradient ~ g v
    the best seed is kept

State: one seed; v is two terms and never stored.  Forwards per step: candidates + 2 (4).  Source: MeZO-GV's code.
Deviations: the published v takes the noise of other seeds from the second tensor on, which leaves it no guidance
(`reference` says corr 1, 0, 0, ...); here both terms are the directions that were evaluated.  What it can gain is
little by construction: g v is the same for v and -v, so with two candidates it does not matter which was the better,
and what guides is that a seed is kept.  v has variance 2, so the expected step is twice MeZO's (with fresh seeds).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zo_finetuner.errors import InputError
from zo_finetuner.optim.base import Probe, StepContext
from zo_finetuner.optim.directions import Combination, Direction, chosen
from zo_finetuner.optim.estimators import Estimate, Estimator
from zo_kernels import Blocks


@dataclass
class Guided(Estimator):
    """probes: candidates, the kept one among them.  greedy: along the best alone."""

    probes: int = 2
    greedy: bool = False

    pairs = 1

    def __post_init__(self) -> None:
        if self.probes < 2:
            raise InputError(f"probes must be at least 2, got {self.probes}: the best of one candidate is no choice")

    @property
    def forwards(self) -> int:
        return self.probes + 2

    def start(self, blocks: Blocks) -> None:
        self.memory["seed"] = torch.zeros((), dtype=torch.int64, device=blocks.device)
        self.memory["known"] = torch.zeros((), dtype=torch.bool, device=blocks.device)

    def ask(self, directions: list[Direction], context: StepContext) -> list[Probe]:
        """The last of the directions stands for the kept one before there is one."""
        *new, last = directions
        kept = torch.where(self.memory["known"], self.memory["seed"], last.seed)
        self._candidates, self._context, self._along = [*new, last.of_seed(kept)], context, None
        return [Probe(direction, context.eps) for direction in self._candidates]

    def tell(self, losses: Tensor) -> Estimate | list[Probe]:
        eps = self._context.eps
        if self._along is None:
            self._along = self._choose(losses)
            return [Probe(self._along, eps), Probe(self._along, -eps)]
        g = (losses[0] - losses[1]) / (2 * eps)
        terms = [(direction, g * weight) for direction, weight in self._along.terms]
        return Estimate.of(terms, losses.mean(), g, losses)

    def _choose(self, losses: Tensor) -> Combination:
        best = chosen(self._candidates, losses.argmin())
        self.memory["seed"].copy_(best.seed)
        self.memory["known"].fill_(True)
        one = torch.ones_like(losses[0])
        terms = [(best, one)]
        if not self.greedy:
            terms.append((chosen(self._candidates, losses.argmax()), -one))
        return Combination(tuple(terms))
