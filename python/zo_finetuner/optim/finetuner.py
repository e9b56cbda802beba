"""ZO Fine-tuner, deployment (arXiv 2510.00419): a learned perturbation scale for every parameter block.

    sigma_b = |PertNN_b(mean_b, var_b, l+, l-, sigma_b)|         losses and raw sigma of the step before (0 and 1)
    nu      = sqrt(sum c_b) / sqrt(sum c_b sigma_b^2)            c_b = numel, of an embedding hidden * 15 * batch
    l+-     = f(theta +- eps nu sigma_b z_b),   g = (l+ - l-) / 2 eps,   theta_b -= lr g nu sigma_b z_b

State: 3 numbers per block (449 weights per block in the nets).  Forwards per step: 2.
Deviation: the product nu * sigma_b is rounded to fp16 before it is used (`exact_scales` switches that off), so that a
journal holds exactly what was applied in 2 bytes a block.  A non-finite loss is not fed back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zo_finetuner.optim.base import Direction, Method, Probe, StepContext, Update, central_difference
from zo_finetuner.pertnn import PertNN, normalizer


@dataclass
class ZOFineTuner(Method):
    """nets: one net per block, in the order of the engine's blocks.  budget: c_b, (blocks,); None: not normalised."""

    nets: PertNN
    budget: Tensor | None
    dist: str = "normal"
    exact_scales: bool = False

    name = "zo-finetuner"
    forwards = 2

    def __post_init__(self) -> None:
        weight = self.nets.w1
        self.sigma = torch.ones(weight.shape[0], dtype=torch.float32, device=weight.device)
        self.losses = torch.zeros(2, dtype=torch.float32, device=weight.device)

    @torch.no_grad()
    def ask(self, context: StepContext) -> list[Probe]:
        stats = context.block_stats()
        self.sigma = self.nets(stats.mean, stats.var, self.losses[0], self.losses[1], self.sigma)
        norm = torch.ones_like(self.sigma[0]) if self.budget is None else normalizer(self.sigma, self.budget)
        scale = (norm * self.sigma).float()
        if not self.exact_scales:
            scale = scale.half().float()
        self.metrics = {"norm_factor": norm, "scale_min": scale.min(), "scale_max": scale.max()}
        self._context, self._direction = context, Direction(context.seed(0), scale, self.dist)
        return [Probe(self._direction, context.eps), Probe(self._direction, -context.eps)]

    def tell(self, losses: Tensor) -> Update:
        self.losses = torch.where(torch.isfinite(losses).all(), losses, self.losses)
        return central_difference(self._direction, self._context.lr, self._context.eps, losses)

    def state_dict(self) -> dict[str, Any]:
        return {"sigma": self.sigma, "losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sigma = state["sigma"].to(self.sigma)
        self.losses = state["losses"].to(self.losses)
