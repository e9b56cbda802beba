"""Sums of few rank-one terms, merged into a weight:  out = round(decay * theta + left^T right), one pass.

    theta   (m, n), fp32, bf16 or fp16          left (k, m), right (k, n), fp32
    arithmetic in fp32; the product is torch's, so its sum over k has no fixed order and devices differ in the last bits
    16-bit results are rounded stochastically with the bits of the noise contract (element = row * n + column), so an
    average over seeds is the unrounded sum; fp32 results are not rounded again

Made of torch's matrix product and the op `words`, in pieces of 2^22 elements (64 MB at a time): a merge is rare, and
20 passes over a piece are less than a step (on a CPU, 6M weights: a tenth of a forward).
"""

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.noise import ROUNDING
from zo_kernels.ops import words
from zo_kernels.rounding import round_stochastic

PIECE = 1 << 22


@torch.no_grad()
def add_product(
    theta: Tensor,
    left: Tensor,
    right: Tensor,
    tensor_id: int,
    rounding_seed: Tensor,
    *,
    decay: Tensor | None = None,
    out: Tensor | None = None,
) -> None:
    """out (theta itself when not given; same dtype and shape) = round(decay * theta + left^T right).

    rounding_seed: 0-dim int64; decay: 0-dim fp32.  ValueError for shapes that do not fit."""
    out = theta if out is None else out
    (m, n), k = theta.shape, left.shape[0]
    if left.shape != (k, m) or right.shape != (k, n) or out.shape != theta.shape:
        raise ValueError(f"no product of {tuple(left.shape)} and {tuple(right.shape)} adds to {tuple(theta.shape)}")
    rows = max(1, PIECE // max(n, 1))
    for first in range(0, m, rows):
        piece = slice(first, first + rows)
        acc = theta[piece].float() if decay is None else theta[piece].float() * decay
        acc = torch.addmm(acc, left[:, piece].t(), right)
        if theta.dtype != torch.float32:
            acc = _rounded(acc, _bits(first * n, acc.numel(), tensor_id, rounding_seed), theta.dtype)
        out[piece].copy_(acc)


def _bits(start: int, count: int, tensor_id: int, seed: Tensor) -> Tensor:
    """Rounding bits of consecutive elements: int32 (count,), below 2^16."""
    skipped = start & 7
    fields = words((skipped + count + 7) >> 3, seed, tensor_id, ROUNDING, first_group=start >> 3).view(torch.int16)
    return fields.view(-1)[skipped : skipped + count].to(torch.int32) & 0xFFFF


def _rounded(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    bits = bits.view(x.shape)
    if dtype == torch.float16:
        return round_stochastic(x, bits.to(torch.int64), dtype)
    # The sum of a finite number's pattern and its bits carries at most into the exponent: 32-bit integers will do.
    up = ((x.view(torch.int32) + bits) >> 16).to(torch.int16).view(dtype)
    return torch.where(torch.isfinite(x), up, x.to(dtype))
