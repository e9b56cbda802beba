"""An update as one kernel call: all terms in one read and one write of the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from zo_finetuner.optim.base import Direction
from zo_kernels import Blocks, update_


def apply_terms(
    blocks: Blocks, terms: list[tuple[Direction, Tensor]], decay: Tensor | None, rounding_seed: Tensor
) -> None:
    """theta = round(decay * theta + sum coef * direction), in the order of the terms; one distribution.

    coefs, decay: 0-dim fp32 (decay may be None); rounding_seed: 0-dim int64.  ValueError for two distributions."""
    if not terms:
        return
    directions = [direction for direction, _ in terms]
    first = directions[0]
    if any(d.dist != first.dist for d in directions):
        raise ValueError("all terms of an update share one distribution")
    seeds = torch.stack([d.seed for d in directions])
    coefs = torch.stack([coef for _, coef in terms])
    scale = first.scale
    if any(d.scale is not scale for d in directions):
        ones = torch.ones(len(blocks), dtype=torch.float32, device=blocks.device)
        scale = torch.stack([ones if d.scale is None else d.scale for d in directions])
    update_(blocks, seeds, coefs, scale, decay=decay, rounding_seed=rounding_seed, dist=first.dist)
