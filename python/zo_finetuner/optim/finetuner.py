"""ZO Fine-tuner, deployment (arXiv 2510.00419): a learned perturbation scale for every parameter block.

    sigma_b = policy(statistics of theta_b, steps before)        PertNN (the paper's nets) or ScaleNet (`zo learn`)
    nu      = sqrt(sum c_b) / sqrt(sum c_b sigma_b^2)            c_b = numel, of an embedding hidden * 15 * batch
    l+-     = f(theta +- eps nu sigma_b z_b),   g = (l+ - l-) / 2 eps,   theta_b -= lr g nu sigma_b z_b

The paper's nets: sigma_b = |PertNN_b(mean_b, var_b, l+, l-, sigma_b)|, losses and raw sigma of the step before (0, 1).
State: one number per block and four (449 weights per block in the paper's nets).  Forwards per step: 2.
Deviation: the product nu * sigma_b is rounded to fp16 before it is used (`exact_scales` switches that off), so that a
journal holds exactly what was applied in 2 bytes a block.  A non-finite loss is not fed back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zo_finetuner.history import History
from zo_finetuner.optim.base import Direction, Method, Probe, StepContext, Update, central_difference
from zo_finetuner.pertnn import PertNN, normalizer
from zo_finetuner.scale_net import ScaleNet


@dataclass
class ZOFineTuner(Method):
    """nets: for the blocks of the engine, in their order.  budget: c_b, (blocks,); None: not normalised."""

    nets: PertNN | ScaleNet
    budget: Tensor | None
    dist: str = "normal"
    exact_scales: bool = False

    name = "zo-finetuner"
    forwards = 2

    def __post_init__(self) -> None:
        self.history = History.start(len(self.nets.names), self.nets.b1.device)

    @property
    def sigma(self) -> Tensor:
        """Raw scales of the last step, (blocks,) fp32; 1 before the first."""
        return self.history.sigma

    @property
    def losses(self) -> Tensor:
        """Losses of the last step that were finite, (2,) fp32; 0 before the first."""
        return self.history.losses

    @torch.no_grad()
    def ask(self, context: StepContext) -> list[Probe]:
        sigma = self.nets.scales(context.block_stats(), self.history)
        self.history.sigma.copy_(sigma)
        norm = torch.ones_like(sigma[0]) if self.budget is None else normalizer(sigma, self.budget)
        scale = (norm * sigma).float()
        if not self.exact_scales:
            scale = scale.half().float()
        self.metrics = {"norm_factor": norm, "scale_min": scale.min(), "scale_max": scale.max()}
        self._context, self._direction = context, Direction(context.seed(0), scale, self.dist)
        return [Probe(self._direction, context.eps), Probe(self._direction, -context.eps)]

    def tell(self, losses: Tensor) -> Update:
        self.history.remember(losses)
        return central_difference(self._direction, self._context.lr, self._context.eps, losses)

    def state_dict(self) -> dict[str, Any]:
        return self.history.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history.load_state_dict(state)
