"""Conservative zeroth-order SGD (ZO-Bench, arXiv 2402.11592): of three points of a line, the best on the batch.

    f0 = f(theta),  g = (f(theta + eps z) - f(theta - eps z)) / 2 eps
    theta <- the best of  theta,  theta - lr g z,  theta + lr g z

State: none.  Forwards per step: 5.  A tie stays.  Deviation: the published code undoes a trial by an optimizer step
with the opposite gradient, which does not lead back under its default AdamW; here trials are probes, nothing is undone.
With 16-bit weights and small rates |f0 - f_A| is below what a forward resolves, and the choice close to a coin's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zo_finetuner.optim.base import Probe, StepContext, Update
from zo_finetuner.optim.composed import Directed


@dataclass
class Conservative(Directed):
    name: str = "zo-conservative"

    forwards, pairs = 5, 2
    fixed = {
        "rule": "it tries three points of one line, which is what plain SGD steps are",
        "estimator": "its second round tries the step that a pair of probes proposes",
    }

    def ask(self, context: StepContext) -> list[Probe]:
        (self._direction,) = self.draw(context)
        self._first: Tensor | None = None
        return [Probe(None), Probe(self._direction, context.eps), Probe(self._direction, -context.eps)]

    def tell(self, losses: Tensor) -> Update | list[Probe]:
        if self._first is None:
            self._first = losses
            self._g = (losses[1] - losses[2]) / (2 * self._context.eps)
            self._step = self._context.lr * self._g
            return [Probe(self._direction, -self._step), Probe(self._direction, self._step)]
        self.scales.remember(self._first[1:])
        stay, (down, up) = self._first[0], losses
        coef = torch.where(down < stay, -self._step, torch.zeros_like(self._step))
        coef = torch.where(up < torch.minimum(stay, down), self._step, coef)
        return Update([(self._direction, coef)], stay, self._g)
