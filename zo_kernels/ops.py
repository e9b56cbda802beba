"""The ops: what a zeroth-order step does to weights.  Signatures, equations, argument checks, dispatch.

                    per tensor b, z_kb = `zo_kernels.noise` at (seed_k, tensor id of b, element)      bytes, 16-bit
    perturb_        theta += coef * scale_b * z_b              in place, rounded to nearest                 4
    update_         theta  = round(decay * theta + sum_k coef_k * scale_kb * z_kb)                          4, any K
    scratch         out = round(theta + sum_k coef_k * scale_k * z_k)         theta is only read            4, any K
                    and mirror = round(theta - sum_k ...), from the same read                               6
    update_scratch_ an update, and from the new theta the next probe's scratch (and mirror)                 6 (8)
    dot_noise       sum over elements of x_b * z_kb                                                         2
    block_stats     mean, unbiased variance, norm, non-finite count                                         2

`stats=True` lets the statistics of what a pass leaves in theta (of x, for dot_noise) ride on it.  A two-noise pass
(way back, update and next perturbation of weights that are probed in place) is an `update_` with two seeds.

Arithmetic is fp32: acc = fl32(theta), with decay acc = fl32(acc * decay), then in order of k
acc = fma(fl32(coef_k * scale_kb), z_kb, acc), then one rounding.  Seeds, coefficients and scales are device tensors; no
op waits for the host.  Errors come before any weight is touched and name the tensor or the argument (`arguments`).
With a `form` of the direction (`zo_kernels.forms`), something made of z and of a state tensor or of theta stands in
place of z.  Updates by a rule that keeps state are in `zo_kernels.states`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from zo_kernels.arguments import (
    require,
    require_directions,
    require_dist,
    require_form,
    require_optional,
    require_scratch,
)
from zo_kernels.blocks import Blocks, BlockStats
from zo_kernels.dispatch import backend
from zo_kernels.forms import Form
from zo_kernels.noise import DIRECTION, LOW_RANK, MASK
from zo_kernels.parts import joined, parts_of


def seed_tensor(seeds: int | Iterable[int], device: torch.device | str = "cpu") -> Tensor:
    """Unsigned 64-bit seeds as an int64 tensor of the same bits: 0-dim for one seed, (K,) for several."""

    def signed(seed: int) -> int:
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed {seed} is not an unsigned 64-bit integer")
        return seed - (1 << 64) if seed >= 1 << 63 else seed

    values = signed(seeds) if isinstance(seeds, int) else [signed(s) for s in seeds]
    return torch.tensor(values, dtype=torch.int64, device=device)


@torch.no_grad()
def perturb_(
    blocks: Blocks,
    seed: Tensor,
    coef: Tensor,
    scale: Tensor | None = None,
    *,
    dist: str = "normal",
    form: Form | None = None,
) -> None:
    """theta_b += coef * scale_b * z_b in place, fp32 arithmetic, rounded to nearest.

    seed: 0-dim int64; coef: 0-dim fp32; scale: (len(blocks),) fp32 or None for ones.  Not undone exactly by the
    opposite coefficient: fp32 weights return to within rounding, 16-bit weights drift (use `scratch`)."""
    require(seed, "seed", torch.int64, (), blocks.device)
    require(coef, "coef", torch.float32, (), blocks.device)
    update_(blocks, seed.reshape(1), coef.reshape(1), scale, dist=dist, form=form)


@torch.no_grad()
def update_(
    blocks: Blocks,
    seeds: Tensor,
    coefs: Tensor,
    scale: Tensor | None = None,
    *,
    decay: Tensor | None = None,
    rounding_seed: Tensor | None = None,
    dist: str = "normal",
    stats: bool = False,
    form: Form | None = None,
) -> BlockStats | None:
    """theta_b = round(decay * theta_b + sum_k coefs[k] * scale_b * z_kb), one read and one write of theta.

    seeds: (K,) int64; coefs: (K,) fp32; scale: (len(blocks),) fp32, (K, len(blocks)) for a scale per direction, or
    None; decay: 0-dim fp32, usually fl32(1 - lr * weight_decay); rounding_seed: 0-dim int64, the step's rounding seed:
    16-bit weights are then rounded stochastically, without it to nearest.  fp32 weights are never rounded again.
    stats: return the statistics of the new weights, made in the same pass.  form: of the directions, its tensors in
    lists; a mean is added after the decay, a limit is for theta before it.

    Weights displaced by c * z_t, to be restored, updated by u * z_t and displaced by c' * z_t+1, take one pass:
    seeds (t, t+1), coefs (u - decay * c, c')."""
    blocks.refresh()
    require_directions(seeds, coefs, scale, (len(blocks),), blocks.device, dist)
    require_optional({"decay": decay}, torch.float32, blocks.device)
    require_optional({"rounding_seed": rounding_seed}, torch.int64, blocks.device)
    require_form(form, blocks)
    parts = parts_of(blocks)
    if parts:
        made = [
            update_(part.blocks, part.sent(seeds), part.sent(coefs), part.chosen(scale), decay=part.sent(decay),
                    rounding_seed=part.sent(rounding_seed), dist=dist, stats=stats, form=part.formed(form))
            for part in parts
        ]  # fmt: skip
        return joined(parts, made, blocks.device) if stats else None
    result = BlockStats.empty(len(blocks), blocks.device) if stats else None
    backend(blocks.device.type).axpy_(blocks, seeds, coefs, scale, decay, rounding_seed, dist, result, form)
    return result


@torch.no_grad()
def scratch(
    theta: Tensor,
    out: Tensor,
    tensor_id: int,
    seeds: Tensor,
    coefs: Tensor,
    scale: Tensor | None = None,
    *,
    mirror: Tensor | None = None,
    nearest_above: Tensor | None = None,
    rows: Tensor | None = None,
    dist: str = "normal",
    stats: bool = False,
    form: Form | None = None,
    offset: int = 0,
) -> BlockStats | None:
    """out = round(theta + sum_k coefs[k] * scale_k * z_k); theta is only read.

    theta: contiguous, any of fp32/bf16/fp16; out: same dtype and shape, or (len(rows), *theta.shape[1:]) with rows:
    an int64 vector of row numbers (an embedding's looked-up tokens, a head's candidates; repeats allowed): row i of
    out is the perturbed row rows[i] of theta, with the noise of its place in theta.
    seeds: int64, 0-dim for one direction or (K,); coefs: fp32, as many; scale: fp32, 0-dim, (K,) or None.
    mirror: like out, gets the other sign of every term from the same read, its rounding decided by the same bits.
    nearest_above: 0-dim fp32; 16-bit results are rounded to nearest where |coefs[0] * scale_0| >= nearest_above and
    stochastically (bits of the first seed) below; None: always nearest.
    Round-to-nearest in bf16 realises only 23 % of a perturbation of 1e-3 on a weight of 1.0.
    stats: return the statistics of theta, vectors of one value (not with rows, which read a part of it).
    form: of the directions; its tensor is like theta, and is read by the same rows.
    offset: global index of theta's first element, of a shard (not with rows)."""
    require_scratch(theta, out, mirror, rows)
    if seeds.dim():
        require_directions(seeds, coefs, scale, (), theta.device, dist)
    else:
        require_dist(dist)
        require(seeds, "seeds", torch.int64, (), theta.device)
        require(coefs, "coefs", torch.float32, (), theta.device)
        require_optional({"scale": scale}, torch.float32, theta.device)
    if rows is not None:
        require(rows, "rows", torch.int64, (rows.shape[0],), theta.device)
        if stats:
            raise ValueError("stats need all of theta, and rows read a part of it")
        if offset:
            raise ValueError("rows are numbered in a whole tensor: a shard has an offset instead")
    require_optional({"nearest_above": nearest_above}, torch.float32, theta.device)
    require_form(form, theta)
    result = BlockStats.empty(1, theta.device) if stats else None
    backend(theta.device.type).scratch(
        theta, out, mirror, tensor_id, seeds, coefs, scale, nearest_above, rows, dist, result, form, offset
    )
    return result


@torch.no_grad()
def update_scratch_(
    theta: Tensor,
    out: Tensor,
    tensor_id: int,
    seeds: Tensor,
    coefs: Tensor,
    scale: Tensor | None,
    next_seed: Tensor,
    next_coef: Tensor,
    next_scale: Tensor | None = None,
    *,
    mirror: Tensor | None = None,
    decay: Tensor | None = None,
    rounding_seed: Tensor | None = None,
    nearest_above: Tensor | None = None,
    dist: str = "normal",
    stats: bool = False,
) -> BlockStats | None:
    """`update_` of one tensor and `scratch` of the new weights with the next direction, in one pass; the same bits as
    the two calls.  seeds, coefs (K,), scale: 0-dim or (K,) fp32, decay and rounding_seed belong to the update;
    next_seed, next_coef, next_scale, mirror and nearest_above to the scratch.  stats: of the new weights."""
    require_scratch(theta, out, mirror, None)
    require_directions(seeds, coefs, scale, (), theta.device, dist)
    require_optional({"next_seed": next_seed, "rounding_seed": rounding_seed}, torch.int64, theta.device)
    floats = {"next_coef": next_coef, "next_scale": next_scale, "decay": decay, "nearest_above": nearest_above}
    require_optional(floats, torch.float32, theta.device)
    result = BlockStats.empty(1, theta.device) if stats else None
    backend(theta.device.type).update_scratch_(
        theta, out, mirror, tensor_id, seeds, coefs, scale, decay, rounding_seed,
        next_seed, next_coef, next_scale, nearest_above, dist, result,
    )  # fmt: skip
    return result


@torch.no_grad()
def dot_noise(
    blocks: Blocks, seeds: Tensor, *, dist: str = "normal", stats: bool = False
) -> Tensor | tuple[Tensor, BlockStats]:
    """<x_b, z_kb> for every block (gradients under their parameters' names, say) and K seeds: fp32 (K, len(blocks)),
    products in fp32, summed across chunks in fp64, in a fixed order.  stats: also the statistics of x."""
    blocks.refresh()
    require_directions(seeds, None, None, (len(blocks),), blocks.device, dist)
    parts = parts_of(blocks)
    if parts:
        made = [dot_noise(part.blocks, part.sent(seeds), dist=dist, stats=True) for part in parts]
        out = torch.empty((seeds.shape[0], len(blocks)), dtype=torch.float32, device=blocks.device)
        for part, (dots, _) in zip(parts, made, strict=True):
            out[:, part.index] = dots.to(blocks.device)
        return (out, joined(parts, [own for _, own in made], blocks.device)) if stats else out
    out = torch.empty((seeds.shape[0], len(blocks)), dtype=torch.float32, device=blocks.device)
    result = BlockStats.empty(len(blocks), blocks.device) if stats else None
    backend(blocks.device.type).dot_noise(blocks, seeds, out, dist, result)
    return out if result is None else (out, result)


@torch.no_grad()
def block_stats(blocks: Blocks) -> BlockStats:
    """Mean, unbiased variance, norm and non-finite count of every block, in one read; deterministic."""
    blocks.refresh()
    parts = parts_of(blocks)
    if parts:
        return joined(parts, [block_stats(part.blocks) for part in parts], blocks.device)
    stats = BlockStats.empty(len(blocks), blocks.device)
    backend(blocks.device.type, "block_stats").block_stats(blocks, stats)
    return stats


@torch.no_grad()
def noise(
    shape: int | tuple[int, ...],
    seed: Tensor,
    tensor_id: int,
    *,
    start: int = 0,
    dist: str = "normal",
    stream: int = DIRECTION,
) -> Tensor:
    """z of `shape` consecutive elements beginning at global element index `start`: fp32, on the seed's device.
    stream: of the contract; `LOW_RANK` and `MASK` are the numbers of other uses of the same seed and tensor."""
    require_dist(dist)
    if stream not in (DIRECTION, LOW_RANK, MASK):
        raise ValueError(f"no noise comes from stream {stream}: {DIRECTION}, {LOW_RANK} and {MASK} have some")
    require(seed, "seed", torch.int64, (), seed.device)
    out = torch.empty(shape, dtype=torch.float32, device=seed.device)
    backend(seed.device.type).noise(out, seed, tensor_id, start, dist, stream)
    return out


@torch.no_grad()
def words(groups: int, seed: Tensor, tensor_id: int, stream: int, *, first_group: int = 0) -> Tensor:
    """Philox words of `groups` consecutive groups: int32 (groups, 4), the bit patterns of the unsigned words."""
    require(seed, "seed", torch.int64, (), seed.device)
    out = torch.empty((groups, 4), dtype=torch.int32, device=seed.device)
    backend(seed.device.type).words(out, seed, tensor_id, stream, first_group)
    return out
