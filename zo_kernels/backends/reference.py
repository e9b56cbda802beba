"""The reference backend: every op in plain torch, on any device, slow and obvious.  It is the specification.

Coefficients, scales and seeds are read as tensors, so nothing here waits for the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels import noise as contract
from zo_kernels.blocks import Blocks
from zo_kernels.rounding import fma, round_stochastic

CHUNK = 1 << 20  # elements at a time: the int64 words of a chunk take 64 MB


def words(out: Tensor, seed: Tensor, tensor_id: int, stream: int, first_group: int) -> None:
    groups = torch.arange(out.shape[0], dtype=torch.int64, device=out.device) + first_group
    w = contract.words(groups, seed, tensor_id, stream)
    out.copy_(torch.where(w >= 1 << 31, w - (1 << 32), w))


def directions(elements: Tensor, seed: Tensor, tensor_id: int, dist: str) -> Tensor:
    draw = contract.normal if dist == "normal" else contract.rademacher
    return draw(elements, seed, tensor_id)


def noise(out: Tensor, seed: Tensor, tensor_id: int, start: int, dist: str) -> None:
    flat = out.view(-1)
    for first in range(0, flat.numel(), CHUNK):
        part = flat[first : first + CHUNK]
        elements = torch.arange(part.numel(), dtype=torch.int64, device=out.device) + (start + first)
        part.copy_(directions(elements, seed, tensor_id, dist))


def axpy_(
    blocks: Blocks,
    seeds: Tensor,
    coefs: Tensor,
    scale: Tensor | None,
    decay: Tensor | None,
    rounding_seed: Tensor | None,
    dist: str,
) -> None:
    for b, tensor in enumerate(blocks.tensors):
        flat = tensor.reshape(-1)  # a copy where the tensor is not contiguous
        for first in range(0, flat.numel(), CHUNK):
            part = flat[first : first + CHUNK]
            elements = torch.arange(part.numel(), dtype=torch.int64, device=part.device)
            elements += blocks.offsets[b] + first
            acc = part.to(torch.float32)
            if decay is not None:
                acc = acc * decay
            for k in range(seeds.shape[0]):
                step = coefs[k] if scale is None else coefs[k] * scale[b]
                acc = fma(step, directions(elements, seeds[k], blocks.ids[b], dist), acc)
            if rounding_seed is None or tensor.dtype == torch.float32:
                part.copy_(acc)
            else:
                bits = contract.rounding_bits(elements, rounding_seed, blocks.ids[b])
                part.copy_(round_stochastic(acc, bits, tensor.dtype))
        if flat.data_ptr() != tensor.data_ptr():
            tensor.copy_(flat.view(tensor.shape))


def scratch(
    theta: Tensor,
    out: Tensor,
    tensor_id: int,
    seed: Tensor,
    coef: Tensor,
    scale: Tensor | None,
    nearest_above: Tensor | None,
    rows: Tensor | None,
    dist: str,
) -> None:
    if rows is None:
        elements = torch.arange(theta.numel(), dtype=torch.int64, device=theta.device).view(theta.shape)
    else:
        width = theta[0].numel()
        columns = torch.arange(width, dtype=torch.int64, device=theta.device)
        elements = (rows.to(torch.int64)[:, None] * width + columns).view(out.shape)
        theta = theta.index_select(0, rows)
    step = coef if scale is None else coef * scale
    x = fma(step, directions(elements, seed, tensor_id, dist), theta.to(torch.float32))
    if theta.dtype == torch.float32 or nearest_above is None:
        out.copy_(x)
    else:
        bits = contract.rounding_bits(elements, seed, tensor_id)
        stochastic = round_stochastic(x, bits, theta.dtype)
        out.copy_(torch.where(step.abs() >= nearest_above, x.to(theta.dtype), stochastic))


def block_stats(blocks: Blocks, mean: Tensor, var: Tensor) -> None:
    for b, tensor in enumerate(blocks.tensors):
        x = tensor.double()
        mean[b] = x.mean()
        var[b] = x.var() if x.numel() > 1 else 0.0
