"""ZO Fine-tuner, deployment (arXiv 2510.00419): a learned perturbation scale for every parameter block.

    sigma_b = policy(statistics of theta_b, steps before)        PertNN (the paper's nets) or ScaleNet (`zo learn`)
    nu      = sqrt(sum c_b) / sqrt(sum c_b sigma_b^2)            c_b = numel, of an embedding hidden * 15 * batch
    l+-     = f(theta +- eps nu sigma_b z_b),   g = (l+ - l-) / 2 eps,   theta_b -= lr g nu sigma_b z_b

The paper's nets: sigma_b = |PertNN_b(mean_b, var_b, l+, l-, sigma_b)|, losses and raw sigma of the step before (0, 1).
State: one number per block and four (449 weights per block in the paper's nets).  Forwards per step: 2.
Deviation: the product nu * sigma_b is rounded to fp16 before it is used (`exact_scales` switches that off), so that a
journal holds exactly what was applied in 2 bytes a block.  A skipped step is not fed back.
The policy goes with other estimators and rules too; one without pairs of probes feeds back its mean loss twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zo_finetuner.history import History
from zo_finetuner.optim.base import StepContext
from zo_finetuner.optim.composed import Composed
from zo_finetuner.optim.scales import Ones
from zo_finetuner.pertnn import PertNN, normalizer
from zo_finetuner.scale_net import ScaleNet


@dataclass
class Learned(Ones):
    """nets: for the blocks of the engine, in their order.  budget: c_b, (blocks,); None: not normalised."""

    nets: PertNN | ScaleNet | None = None
    budget: Tensor | None = None
    exact_scales: bool = False

    def __post_init__(self) -> None:
        self.history = History.start(len(self.nets.names), self.nets.b1.device)
        self.memory = self.history.state_dict()
        self._metrics: dict[str, Tensor] = {}

    @torch.no_grad()
    def scale(self, context: StepContext) -> Tensor:
        sigma = self.nets.scales(context.block_stats(), self.history)
        self.history.sigma.copy_(sigma)
        norm = torch.ones_like(sigma[0]) if self.budget is None else normalizer(sigma, self.budget)
        scale = (norm * sigma).float()
        if not self.exact_scales:
            scale = scale.half().float()
        self._metrics = {"norm_factor": norm, "scale_min": scale.min(), "scale_max": scale.max(), "sigma": scale}
        return scale

    def remember(self, losses: Tensor) -> None:
        self.history.remember(losses)

    @property
    def halves(self) -> bool:
        return not self.exact_scales

    @property
    def metrics(self) -> dict[str, Tensor]:
        return self._metrics


@dataclass
class ZOFineTuner(Composed):
    """scales: `Learned`."""

    name: str = "zo-finetuner"

    @property
    def sigma(self) -> Tensor:
        """Raw scales of the last step, (blocks,) fp32; 1 before the first."""
        return self.scales.history.sigma

    @property
    def losses(self) -> Tensor:
        """Losses of the last step that were finite, (2,) fp32; 0 before the first."""
        return self.scales.history.losses

    @property
    def budget(self) -> Tensor | None:
        return self.scales.budget
