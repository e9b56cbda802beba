"""The reference backend: every op in plain torch, on any device, slow and obvious.  It is the specification.

Coefficients, scales and seeds are read as tensors, so nothing here waits for the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from zo_kernels import noise as contract
from zo_kernels.blocks import Blocks, BlockStats
from zo_kernels.forms import Form
from zo_kernels.passes import one_by_one
from zo_kernels.rounding import fma, round_stochastic, sqrt

CHUNK = 1 << 20  # elements at a time: the int64 words of a chunk take 64 MB


def words(out: Tensor, seed: Tensor, tensor_id: int, stream: int, first_group: int) -> None:
    groups = torch.arange(out.shape[0], dtype=torch.int64, device=out.device) + first_group
    w = contract.words(groups, seed, tensor_id, stream)
    out.copy_(torch.where(w >= 1 << 31, w - (1 << 32), w))


def directions(elements: Tensor, seed: Tensor, tensor_id: int, dist: str, stream: int = contract.DIRECTION) -> Tensor:
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


def _moved(
    acc: Tensor, old: Tensor, elements: Tensor, tensor_id: int, seeds: Tensor, steps: Tensor, dist: str,
    form: Form | None,
) -> Tensor:  # fmt: skip
    """acc + sum_k steps[k] * z'_k, fused, in order of k; of a mean, acc + c * mu first.  old: theta as it was read."""
    kind = None if form is None else form.kind
    if kind == "shifted":
        acc = fma(form.value, form.state.to(torch.float32), acc)
    for k in range(seeds.shape[0]):
        z = directions(elements, seeds[k], tensor_id, dist)
        if kind == "weighted":
            z = z / sqrt(form.state)
        elif kind == "below":
            z = torch.where(old.to(torch.float32).abs() <= form.value, z, 0.0)
        acc = fma(steps[k], z, acc)
    return acc


def _shrunk(old: Tensor, decay: Tensor | None) -> Tensor:
    acc = old.to(torch.float32)
    return acc if decay is None else acc * decay


def _rounded(acc: Tensor, elements: Tensor, tensor_id: int, seed: Tensor | None, dtype: torch.dtype) -> Tensor:
    """To nearest without a seed."""
    if seed is None:
        return acc.to(dtype)
    return round_stochastic(acc, contract.rounding_bits(elements, seed, tensor_id), dtype)


class _Chunk(NamedTuple):
    """Some consecutive elements of a block, as views of flat tensors."""

    theta: Tensor
    states: list[Tensor]
    elements: Tensor  # their global indices
    form: Form | None


def _chunks(block: int, blocks: Blocks, states: list[Tensor], form: Form | None) -> Iterator[_Chunk]:
    """A block that is not contiguous is copied, and written when all its chunks have been."""
    tensor = blocks.tensors[block]
    form = None if form is None else form.of(block)
    flat = tensor.reshape(-1)
    for first in range(0, flat.numel(), CHUNK):
        span = slice(first, first + CHUNK)
        theta = flat[span]
        elements = torch.arange(theta.numel(), dtype=torch.int64, device=theta.device)
        elements += blocks.offsets[block] + first
        own = form
        if own is not None and own.state is not None:
            own = own._replace(state=own.state.reshape(-1)[span])
        yield _Chunk(theta, [state.view(-1)[span] for state in states], elements, own)
    if flat.data_ptr() != tensor.data_ptr():
        tensor.copy_(flat.view(tensor.shape))


def axpy_(
    blocks: Blocks,
    seeds: Tensor,
    coefs: Tensor,
    scale: Tensor | None,
    decay: Tensor | None,
    rounding_seed: Tensor | None,
    dist: str,
    stats: BlockStats | None,
    form: Form | None = None,
) -> None:
    for b, tensor_id in enumerate(blocks.ids):
        steps = _steps(coefs, None if scale is None else scale[..., b])
        for theta, _, elements, own in _chunks(b, blocks, [], form):
            acc = _moved(_shrunk(theta, decay), theta, elements, tensor_id, seeds, steps, dist, own)
            theta.copy_(_rounded(acc, elements, tensor_id, rounding_seed, theta.dtype))
        if stats is not None:
            _fill(stats, b, blocks.tensors[b])


replay_ = partial(one_by_one, axpy_)


def update_state_(
    blocks: Blocks,
    rule: str,
    states: Sequence[Sequence[Tensor]],
    seeds: Tensor,
    coefs: Tensor,
    scale: Tensor | None,
    numbers: Tensor,
    form: Form | None,
    decay: Tensor | None,
    rounding_seed: Tensor | None,
    keep: Tensor | None,
    dist: str,
) -> None:
    for b, tensor_id in enumerate(blocks.ids):
        scales = None if scale is None else scale[..., b]
        steps = _steps(coefs, scales)
        for theta, own_states, elements, own in _chunks(b, blocks, [of_state[b] for of_state in states], form):
            place = (theta, elements, tensor_id, seeds)
            acc = _shrunk(theta, decay)
            if rule == "curvature":
                new, acc = _curved(acc, own_states[0], numbers, *place, steps, dist)
            elif rule == "shifted-mean":
                weights = _steps(numbers[1:], scales)
                mean = Form("shifted", own_states[0], numbers[0])
                acc = _moved(acc, *place, weights, dist, mean)
                new = [_moved(own_states[0], *place, steps, dist, None)]
            else:
                e = _moved(torch.zeros_like(acc), *place, steps, dist, own)
                new, acc = _against(rule, e, acc, own_states, numbers)
            new = [*new, _rounded(acc, elements, tensor_id, rounding_seed, theta.dtype)]
            for old, value in zip([*own_states, theta], new, strict=True):
                old.copy_(value if keep is None else torch.where(keep, value, old))


def _against(rule: str, e: Tensor, acc: Tensor, states: list[Tensor], numbers: Tensor) -> tuple[list[Tensor], Tensor]:
    """The new states, and acc moved against the gradient e: the equations of `zo_kernels.rules`."""
    lr, *rest = numbers.unbind()
    if rule == "momentum":
        m = fma(rest[0], states[0], e)
        return [m], fma(-lr, m, acc)
    if rule in ("sign", "sign-ema"):
        new = [fma(rest[0], states[0], (1 - rest[0]) * e)] if rule == "sign-ema" else []
        along = new[0] if new else e
        return new, fma(-lr, (along > 0).float() - (along < 0).float(), acc)
    b1, b2, eps = rest[:3]
    m, v = fma(b1, states[0], (1 - b1) * e), fma(b2, states[1], (1 - b2) * (e * e))
    if rule == "adam":
        c1, c2 = rest[3:]
        return [m, v], acc - (lr / c1) * m / (sqrt(v / c2) + eps)
    vmax = torch.where(v > states[2], v, states[2])
    return [m, v, vmax], acc - lr * m / (sqrt(vmax) + eps)


def _curved(
    acc: Tensor, h: Tensor, numbers: Tensor, old: Tensor, elements: Tensor, tensor_id: int, seeds: Tensor,
    steps: Tensor, dist: str,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    a, c = numbers.unbind()
    z = directions(elements, seeds[0], tensor_id, dist)
    h = fma(1 - a, h, (a * c) * ((z * z) * h))
    return [h], _moved(acc, old, elements, tensor_id, seeds, steps, dist, Form("weighted", h))


def scratch(
    theta: Tensor,
    out: Tensor,
    mirror: Tensor | None,
    tensor_id: int,
    seeds: Tensor,
    coefs: Tensor,
    scale: Tensor | None,
    nearest_above: Tensor | None,
    rows: Tensor | None,
    dist: str,
    stats: BlockStats | None,
    form: Form | None = None,
    offset: int = 0,
) -> None:
    if rows is None:
        elements = torch.arange(theta.numel(), dtype=torch.int64, device=theta.device).view(theta.shape) + offset
    else:
        width = theta[0].numel()
        columns = torch.arange(width, dtype=torch.int64, device=theta.device)
        elements = (rows.to(torch.int64)[:, None] * width + columns).view(out.shape)
        theta = theta.index_select(0, rows)
        if form is not None and form.state is not None:
            form = form._replace(state=form.state.index_select(0, rows))
    seeds, steps, acc = seeds.reshape(-1), _steps(coefs, scale).reshape(-1), theta.to(torch.float32)
    for target, sign in ((out, 1), (mirror, -1)):
        if target is not None:
            own = form
            if form is not None and form.kind == "shifted":
                own = form._replace(value=sign * form.value)
            moved = _moved(acc, theta, elements, tensor_id, seeds, sign * steps, dist, own)
            new = _rounded(moved, elements, tensor_id, None, theta.dtype)
            if nearest_above is not None:
                at_random = _rounded(moved, elements, tensor_id, seeds[0], theta.dtype)
                new = torch.where(steps[0].abs() >= nearest_above, new, at_random)
            target.copy_(new)
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
    acc = _moved(_shrunk(theta, decay), theta, elements, tensor_id, seeds, _steps(coefs, scale), dist, None)
    theta.copy_(_rounded(acc, elements, tensor_id, rounding_seed, theta.dtype))
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
