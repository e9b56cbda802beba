"""Scales without learning: sigma_b^2 proportional to (gradient energy per element)^p, from a few backward passes.

    s_b = (mean over batches of ||gradient_b||^2 / numel_b)^p,  scaled so that sum c_b s_b = sum c_b, then clipped

p = 1/2 is where the weighted sum of the blocks' times to converge, sum G_b / s_b, is least under sum D_b s_b = const.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from zo_finetuner.learning.streaming import LossFn, Weights

CLIP = 16.0  # s_b stays in [1/16, 16]: a block that a few batches did not touch is not given up


def batch_energy(weights: Weights, losses: Iterable[LossFn]) -> Tensor:
    """Mean over the batches of each block's squared gradient norm, (blocks,) fp32; one backward per batch."""
    total, count = torch.zeros(len(weights.blocks), dtype=torch.float32, device=weights.device), 0

    def add(blocks: list[int], gradients: list[Tensor]) -> None:
        total[blocks] += torch.stack(torch._foreach_norm(gradients)).square()

    for loss_fn in losses:
        weights.backward(loss_fn(), add)
        count += 1
    return total / max(count, 1)


def closed_form_sigma(energy: Tensor, numels: Tensor, share: Tensor, power: float = 0.5) -> Tensor:
    """sigma (blocks,) fp32 from the energies (blocks,).  numels (blocks,); share: c_b of the normaliser (blocks,)."""
    s = (energy / numels).clamp(min=1e-30).double() ** power
    s = s * (share.sum() / (share * s).sum())
    return s.clamp(1 / CLIP, CLIP).sqrt().float()
