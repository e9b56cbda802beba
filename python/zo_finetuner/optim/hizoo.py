"""HiZOO (Zhao et al., arXiv 2402.15173): scaled by the inverse root of an estimate of the Hessian's diagonal.

    f0 = f(theta),  f+- = f(theta +- eps z / sqrt(h)),  g = (f+ - f-) / 2 eps,  c = |f+ + f- - 2 f0| / 2 eps^2
    h <- (1 - alpha) h + alpha c (z^2 - 1) h;      theta -= lr g z / sqrt(h)

State: h, 1 P in fp32, 1 at the start.  Forwards per step: 3 (the published code takes a fourth for its log).
Source: HiZOO's code, alpha 1e-8.  Deviations: h is fp32 (in the weights' fp16, alpha 1e-8 rounds 1 - alpha to 1 and the
rest to 0: h never moves and the published command is MeZO); with fp32 an increment alpha c (z^2 - 1) still needs to
exceed 6e-8 of h to be felt.  z^2 - 1 instead of the published z^2 centres the estimate: E[z' M z / 2 (z_j^2 - 1)] =
M_jj, without it trace(M) / 2 is added to every coordinate, a common factor that drowns the rest; compat "reference"
has z^2.  alpha c is bounded by (1 - alpha) / 2, so that h stays positive.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zo_finetuner.errors import InputError
from zo_finetuner.optim.base import Probe, RuleStep, StepContext, Update
from zo_finetuner.optim.composed import Directed
from zo_finetuner.optim.directions import Direction
from zo_finetuner.optim.state import new_states
from zo_kernels import Blocks, weighted


@dataclass
class HiZOO(Directed):
    """alpha: share of a step's estimate in h."""

    name: str = "hizoo"
    alpha: float = 1e-8
    compat: str = "intended"

    forwards, pairs = 3, 1
    fixed = {
        "scales": "its curvature is the scale of every weight",
        "rule": "its curvature is updated in the pass that updates the weights",
        "estimator": "curvature is measured by a pair of probes and their centre",
        "subset": "its curvature already scales every weight by itself",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha < 1:
            raise InputError(f"alpha must be at least 0 and below 1, got {self.alpha}")
        if self.compat not in ("intended", "reference"):
            raise InputError(f'compat must be "intended" or "reference", got "{self.compat}"')

    def start(self, blocks: Blocks) -> None:
        super().start(blocks)
        self.states = new_states(blocks, ("h",), self.name, fill=1.0)
        self._form = weighted(self.states["h"])

    def ask(self, context: StepContext) -> list[Probe]:
        (direction,) = self.draw(context, self._form)
        self._plain = Direction(direction.seed, direction.scale, direction.dist)
        return [Probe(None), Probe(direction, context.eps), Probe(direction, -context.eps)]

    def tell(self, losses: Tensor) -> Update:
        center, plus, minus = losses
        eps, lr = self._context.eps, self._context.lr
        g = (plus - minus) / (2 * eps)
        gain = (self.alpha * (plus + minus - 2 * center).abs() / (2 * eps.square())).clamp(max=(1 - self.alpha) / 2)
        # The kernel computes (1 - a) h + a c z^2 h: a c is the gain, and 1 - a what is left of h.
        lost = torch.full_like(gain, self.alpha) + (gain if self.compat == "intended" else 0.0)
        numbers = torch.stack((lost, torch.where(lost > 0, gain / lost, 0.0)))
        by = RuleStep("curvature", [self.states["h"]], numbers)
        return Update([(self._plain, -lr * g)], losses.mean(), g, by)
