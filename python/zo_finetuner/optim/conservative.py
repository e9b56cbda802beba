"""Conservative zeroth-order SGD (ZO-Bench, arXiv 2402.11592): of three points of a line, the best on the batch.

    f0 = f(theta),  g = (f(theta + eps z) - f(theta - eps z)) / 2 eps
    theta <- the best of  theta,  theta - lr g z,  theta + lr g z            (gradient ~ 0, g z, -g z)

State: none.  Forwards per step: 5.  A tie stays.  Deviation: the published code undoes a trial by an optimizer step
with the opposite gradient, which does not lead back under its default AdamW; here trials are probes, nothing is undone.
With 16-bit weights and small rates |f0 - f_A| is below what a forward resolves, and the choice close to a coin's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zo_finetuner.errors import InputError
from zo_finetuner.optim.base import Probe, StepContext
from zo_finetuner.optim.directions import Direction
from zo_finetuner.optim.estimators import Estimate, Estimator


@dataclass
class Conservative(Estimator):
    pairs = 2
    only_sgd = "it tries the very points that steps of plain SGD lead to"

    def __post_init__(self) -> None:
        if self.probes != 1:
            raise InputError(f"probes must be 1, got {self.probes}: the points that are tried lie on one line")

    @property
    def forwards(self) -> int:
        return 5

    def ask(self, directions: list[Direction], context: StepContext) -> list[Probe]:
        (self._direction,), self._context = directions, context
        self._first: Tensor | None = None
        return [Probe(None), Probe(self._direction, context.eps), Probe(self._direction, -context.eps)]

    def tell(self, losses: Tensor) -> Estimate | list[Probe]:
        if self._first is None:
            self._first, self._g = losses, (losses[1] - losses[2]) / (2 * self._context.eps)
            step = self._context.lr * self._g
            return [Probe(self._direction, -step), Probe(self._direction, step)]
        stay, (down, up) = self._first[0], losses
        g = torch.where(down < stay, self._g, 0.0)
        g = torch.where(up < torch.minimum(stay, down), -self._g, g)
        return Estimate.of([(self._direction, g)], stay, self._g, self._first[1:])
