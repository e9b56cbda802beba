"""The reference backend: every op in plain torch, on any device, slow and obvious.  It is the specification.

Coefficients, scales and seeds are read as tensors, so nothing here waits for the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels import noise as contract
from zo_kernels.blocks import Blocks, BlockStats
from zo_kernels.rounding import fma, round_stochastic

CHUNK = 1 << 20  # elements at a time: the int64 words of a chunk take 64 MB


def words(out: Tensor, seed: Tensor, tensor_id: int, stream: int, first_group: int) -> None:
    groups = torch.arange(out.shape[0], dtype=torch.int64, device=out.device) + first_group
    w = contract.words(groups, seed, tensor_id, stream)
    out.copy_(torch.where(w >= 1 << 31, w - (1 << 32), w))


def directions(
    elements: Tensor, seed: Tensor, tensor_id: int, dist: str, stream: int = contract.DIRECTION
) -> Tensor:
    draw = contract.normal if dist == "normal" else contract.rademacher
    return draw(elements, seed, tensor_id, stream)


def noise(out: Tensor, seed: Tensor, tensor_id: int, start: int, dist: str, stream: int = contract.DIRECTION) -> None:
    flat = out.view(-1)
    for first in range(0, flat.numel(), CHUNK):
        part = flat[first : first + CHUNK]
        elements = torch.arange(part.numel(), dtype=torch.int64, device=out.device) + (start + first)
        part.copy_(directions(elements, seed, tensor_id, dist, stream))


def _steps(coefs: Tensor, scale: Tensor | None) -> Tensor:
    """fl32(coef_k * scale_k): (K,)."""
    return coefs if scale is None else coefs * scale


def _advanced(
    old: Tensor,
    elements: Tensor,
    tensor_id: int,
    seeds: Tensor,
    steps: Tensor,
    decay: Tensor | None,
    rounding_seed: Tensor | None,
    dist: str,
) -> Tensor:
    """round(decay * old + sum_k steps[k] * z_k), in the dtype of `old`."""
    acc = old.to(torch.float32)
    if decay is not None:
        acc = acc * decay
    for k in range(seeds.shape[0]):
        acc = fma(steps[k], directions(elements, seeds[k], tensor_id, dist), acc)
    if rounding_seed is None:
        return acc.to(old.dtype)
    return round_stochastic(acc, contract.rounding_bits(elements, rounding_seed, tensor_id), old.dtype)


def axpy_(
    blocks: Blocks,
    seeds: Tensor,
    coefs: Tensor,
    scale: Tensor | None,
    decay: Tensor | None,
    rounding_seed: Tensor | None,
    dist: str,
    stats: BlockStats | None,
) -> None:
    for b, tensor in enumerate(blocks.tensors):
        steps = _steps(coefs, None if scale is None else scale[..., b])
        flat = tensor.reshape(-1)  # a copy where the tensor is not contiguous
        for first in range(0, flat.numel(), CHUNK):
            part = flat[first : first + CHUNK]
            elements = torch.arange(part.numel(), dtype=torch.int64, device=part.device)
            elements += blocks.offsets[b] + first
            part.copy_(_advanced(part, elements, blocks.ids[b], seeds, steps, decay, rounding_seed, dist))
        if flat.data_ptr() != tensor.data_ptr():
            tensor.copy_(flat.view(tensor.shape))
        if stats is not None:
            _fill(stats, b, tensor)


def scratch(
    theta: Tensor,
    out: Tensor,
    mirror: Tensor | None,
    tensor_id: int,
    seed: Tensor,
    coef: Tensor,
    scale: Tensor | None,
    nearest_above: Tensor | None,
    rows: Tensor | None,
    dist: str,
    stats: BlockStats | None,
) -> None:
    if rows is None:
        elements = torch.arange(theta.numel(), dtype=torch.int64, device=theta.device).view(theta.shape)
    else:
        width = theta[0].numel()
        columns = torch.arange(width, dtype=torch.int64, device=theta.device)
        elements = (rows.to(torch.int64)[:, None] * width + columns).view(out.shape)
        theta = theta.index_select(0, rows)
    step = coef if scale is None else coef * scale
    for target, signed in ((out, step), (mirror, -step)):
        if target is not None:
            steps, seeds = signed.reshape(1), seed.reshape(1)
            nearest = _advanced(theta, elements, tensor_id, seeds, steps, None, None, dist)
            if nearest_above is not None:
                stochastic = _advanced(theta, elements, tensor_id, seeds, steps, None, seed, dist)
                nearest = torch.where(step.abs() >= nearest_above, nearest, stochastic)
            target.copy_(nearest)
    if stats is not None:
        _fill(stats, 0, theta)


def update_scratch_(
    theta: Tensor,
    out: Tensor,
    mirror: Tensor | None,
    tensor_id: int,
    seeds: Tensor,
    coefs: Tensor,
    scale: Tensor | None,
    decay: Tensor | None,
    rounding_seed: Tensor | None,
    next_seed: Tensor,
    next_coef: Tensor,
    next_scale: Tensor | None,
    nearest_above: Tensor | None,
    dist: str,
    stats: BlockStats | None,
) -> None:
    elements = torch.arange(theta.numel(), dtype=torch.int64, device=theta.device).view(theta.shape)
    steps = _steps(coefs, scale)
    theta.copy_(_advanced(theta, elements, tensor_id, seeds, steps, decay, rounding_seed, dist))
    scratch(theta, out, mirror, tensor_id, next_seed, next_coef, next_scale, nearest_above, None, dist, stats)


def dot_noise(blocks: Blocks, seeds: Tensor, out: Tensor, dist: str, stats: BlockStats | None) -> None:
    for b, tensor in enumerate(blocks.tensors):
        flat = tensor.reshape(-1)
        total = torch.zeros(seeds.shape[0], dtype=torch.float64, device=out.device)
        for first in range(0, flat.numel(), CHUNK):
            part = flat[first : first + CHUNK].double()
            elements = torch.arange(part.numel(), dtype=torch.int64, device=part.device)
            elements += blocks.offsets[b] + first
            for k in range(seeds.shape[0]):
                total[k] += part @ directions(elements, seeds[k], blocks.ids[b], dist).double()
        out[:, b] = total
        if stats is not None:
            _fill(stats, b, tensor)


def block_stats(blocks: Blocks, stats: BlockStats) -> None:
    for b, tensor in enumerate(blocks.tensors):
        _fill(stats, b, tensor)


def _fill(stats: BlockStats, b: int, tensor: Tensor) -> None:
    x = tensor.double()
    bad = (~torch.isfinite(x)).sum()
    # Around the mean of deviations from the first element: exactly 0 for a constant tensor.
    first = x.flatten()[0] if x.numel() else x.sum()
    center = first + (x - first).mean()
    var = ((x - center) ** 2).sum() / max(x.numel() - 1, 1)
    for out, value in ((stats.mean, center), (stats.var, var), (stats.norm, x.norm())):
        out[b] = torch.where(bad > 0, torch.nan, value)
    stats.nonfinite[b] = bad
