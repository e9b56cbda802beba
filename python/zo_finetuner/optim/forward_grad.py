"""Forward gradient (Baydin et al., arXiv 2202.08587; in ZO-Bench): the exact derivative along a random direction.

    a = <gradient, v> by forward-mode differentiation at theta;   gradient ~ a v

No eps, no truncation error.  State: none, but a step needs v for all weights (1 P in their dtype) and the dual numbers
of the activations.  Forwards per step: one with dual numbers, about two.  Attention runs in its plain form, the fused
kernels have no forward mode.  Deviation: v is not kept after the derivative, the update makes it again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zo_finetuner.optim.base import Slope, StepContext
from zo_finetuner.optim.directions import Direction
from zo_finetuner.optim.estimators import Estimate, Estimator


@dataclass
class ExactSlope(Estimator):
    slopes = True

    @property
    def forwards(self) -> int:
        return 2 * self.probes

    def ask(self, directions: list[Direction], context: StepContext) -> list[Slope]:
        self._directions = directions
        return [Slope(direction) for direction in directions]

    def tell(self, losses: Tensor) -> Estimate:
        """losses: (2 * probes,), a loss and a derivative for each."""
        loss, slope = losses.view(-1, 2).unbind(1)
        g = slope / self.probes
        single = g[0] if self.probes == 1 else torch.linalg.vector_norm(g)
        return Estimate.of(list(zip(self._directions, g, strict=True)), loss.mean(), single)
