"""An update as one kernel call: all terms in one read and one write of the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from zo_finetuner.optim.base import Direction
from zo_kernels import Blocks, seed_tensor, update_


def apply_terms(
    blocks: Blocks, terms: list[tuple[Direction, Tensor]], decay: Tensor | None, rounding_seed: Tensor
) -> None:
    """theta = round(decay * theta + sum coef * direction); all terms share one scale and one distribution.

    coefs: 0-dim fp32; decay: 0-dim fp32 or None; rounding_seed: 0-dim int64.  Raises ValueError for mixed scales."""
    if not terms:
        return
    first = terms[0][0]
    if any(d.scale is not first.scale or d.dist != first.dist for d, _ in terms):
        raise ValueError("all terms of an update share one per-block scale and one distribution")
    seeds = seed_tensor([d.seed for d, _ in terms], blocks.device)
    coefs = torch.stack([coef for _, coef in terms])
    update_(blocks, seeds, coefs, first.scale, decay=decay, rounding_seed=rounding_seed, dist=first.dist)
