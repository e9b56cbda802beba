"""MeZO: zeroth-order SGD with regenerated noise (Malladi et al., arXiv 2305.17333, Algorithm 1).

    l+- = f(theta +- eps z),   g = (l+ - l-) / 2 eps,   theta -= lr g z

State: none.  Forwards per step: 2.  Deviation from the published code: the logged loss is (l+ + l-)/2, not l+.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from zo_finetuner.optim.base import Direction, Method, Probe, StepContext, Update, central_difference


@dataclass
class MeZO(Method):
    """dist: "normal" as published, or "rademacher" (the same estimator quality in high dimension)."""

    dist: str = "normal"

    name = "mezo"
    forwards = 2

    def ask(self, context: StepContext) -> list[Probe]:
        self._context = context
        self._direction = Direction(context.seed(0), dist=self.dist)
        return [Probe(self._direction, context.eps), Probe(self._direction, -context.eps)]

    def tell(self, losses: Tensor) -> Update:
        return central_difference(self._direction, self._context.lr, self._context.eps, losses)
