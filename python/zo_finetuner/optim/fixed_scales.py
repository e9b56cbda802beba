"""Constant scales per block: the honest controls of a learned optimizer.

    l+- = f(theta +- eps s_b z_b),   g = (l+ - l-) / 2 eps,   theta_b -= lr g s_b z_b

    sigma-one     s_b = 1: the normaliser of equal scales is 1, so this is MeZO bit for bit, on the code path of scales
    closed-form   s_b^2 proportional to (||gradient_b||^2 / numel_b)^p, measured beforehand by a few backward passes
                  (`learning/closed_form.py`), normalised as the paper normalises its own: sum c_b s_b^2 = sum c_b

State: the scales.  Forwards per step: 2.  The scales are rounded to fp16, as a journal holds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zo_finetuner.optim.base import Direction, Method, Probe, StepContext, Update, central_difference


@dataclass
class FixedScales(Method):
    """scale: (blocks,) fp32 >= 0, in the order of the engine's blocks."""

    scale: Tensor
    name: str = "closed-form"
    dist: str = "normal"

    forwards = 2

    def __post_init__(self) -> None:
        self.scale = self.scale.half().float()
        self.metrics = {"scale_min": self.scale.min(), "scale_max": self.scale.max()}

    def ask(self, context: StepContext) -> list[Probe]:
        self._context = context
        self._direction = Direction(context.seed(0), self.scale, self.dist)
        return [Probe(self._direction, context.eps), Probe(self._direction, -context.eps)]

    def tell(self, losses: Tensor) -> Update:
        return central_difference(self._direction, self._context.lr, self._context.eps, losses)

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale.copy_(state["scale"])
