"""The ops: what a zeroth-order step does to weights.  Signatures, equations, argument checks, dispatch.

    perturb_      theta_b += coef * scale_b * z_b                   in place, rounded to nearest
    update_       theta_b  = sr(decay * theta_b + sum_k coef_k * scale_b * z_kb)    one read, one write of theta
    scratch       out = round(theta + coef * scale_b * z_b)         theta is only read
    block_stats   mean and unbiased variance of every block
    noise, words  z itself, and the Philox words behind it (tests, audits)

z_kb is `zo_kernels.noise` at (seed_k, tensor id of b, element index).  Arithmetic is fp32: acc = fl32(theta), with
decay acc = fl32(acc * decay), then in order of k acc = fma(fl32(coef_k * scale_b), z_kb, acc), then one rounding.
Seeds, coefficients and scales are device tensors; no op waits for the host.  Bytes moved per element of a 16-bit
tensor: perturb_ 4, update_ 4 (any K), scratch 4, block_stats 2.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from zo_kernels.blocks import DTYPES, Blocks
from zo_kernels.dispatch import backend
from zo_kernels.noise import DISTRIBUTIONS


def seed_tensor(seeds: int | Iterable[int], device: torch.device | str = "cpu") -> Tensor:
    """Unsigned 64-bit seeds as an int64 tensor of the same bits: 0-dim for one seed, (K,) for several."""

    def signed(seed: int) -> int:
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed {seed} is not an unsigned 64-bit integer")
        return seed - (1 << 64) if seed >= 1 << 63 else seed

    values = signed(seeds) if isinstance(seeds, int) else [signed(s) for s in seeds]
    return torch.tensor(values, dtype=torch.int64, device=device)


def _require(tensor: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or tensor.device != device:
        raise ValueError(
            f"{name} must be {str(dtype).removeprefix('torch.')} of shape {shape} on {device}, got "
            f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


def _require_dist(dist: str) -> None:
    if dist not in DISTRIBUTIONS:
        raise ValueError(f"unknown distribution {dist!r}; there are: {', '.join(DISTRIBUTIONS)}")


def _require_step(blocks: Blocks, seeds: Tensor, coefs: Tensor, scale: Tensor | None, dist: str) -> None:
    _require_dist(dist)
    count = seeds.shape[0] if seeds.dim() == 1 else -1
    _require(seeds, "seeds", torch.int64, (max(count, 1),), blocks.device)
    _require(coefs, "coefs", torch.float32, (count,), blocks.device)
    if scale is not None:
        _require(scale, "scale", torch.float32, (len(blocks),), blocks.device)


@torch.no_grad()
def perturb_(
    blocks: Blocks, seed: Tensor, coef: Tensor, scale: Tensor | None = None, *, dist: str = "normal"
) -> None:
    """theta_b += coef * scale_b * z_b in place, fp32 arithmetic, rounded to nearest.

    seed: 0-dim int64; coef: 0-dim fp32; scale: (len(blocks),) fp32 or None for ones.  Not undone exactly by the
    opposite coefficient: fp32 weights return to within rounding, 16-bit weights drift (use `scratch`)."""
    _require(seed, "seed", torch.int64, (), blocks.device)
    _require(coef, "coef", torch.float32, (), blocks.device)
    update_(blocks, seed.reshape(1), coef.reshape(1), scale, dist=dist)


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
) -> None:
    """theta_b = round(decay * theta_b + sum_k coefs[k] * scale_b * z_kb), one read and one write of theta.

    seeds: (K,) int64; coefs: (K,) fp32; scale: (len(blocks),) fp32 or None; decay: 0-dim fp32, usually
    fl32(1 - lr * weight_decay); rounding_seed: 0-dim int64, the step's rounding seed: 16-bit weights are then
    rounded stochastically, without it to nearest.  fp32 weights are never rounded again."""
    _require_step(blocks, seeds, coefs, scale, dist)
    if decay is not None:
        _require(decay, "decay", torch.float32, (), blocks.device)
    if rounding_seed is not None:
        _require(rounding_seed, "rounding_seed", torch.int64, (), blocks.device)
    backend(blocks.device.type).axpy_(blocks, seeds, coefs, scale, decay, rounding_seed, dist)


@torch.no_grad()
def scratch(
    theta: Tensor,
    out: Tensor,
    tensor_id: int,
    seed: Tensor,
    coef: Tensor,
    scale: Tensor | None = None,
    *,
    nearest_above: Tensor | None = None,
    rows: Tensor | None = None,
    dist: str = "normal",
) -> None:
    """out = round(theta + coef * scale * z); theta is only read.

    theta: contiguous, any of fp32/bf16/fp16; out: same dtype and shape, or (len(rows), *theta.shape[1:]) with rows:
    an int64 vector of row numbers (an embedding's looked-up tokens, a head's candidates; repeats allowed): row i of
    out is the perturbed row rows[i] of theta, with the noise of its place in theta.
    seed: 0-dim int64; coef, scale: 0-dim fp32.  nearest_above: 0-dim fp32; 16-bit results are rounded to nearest
    where |coef * scale| >= nearest_above and stochastically (bits of the same seed) below; None: always nearest.
    Round-to-nearest in bf16 realises only 23 % of a perturbation of 1e-3 on a weight of 1.0."""
    _require_dist(dist)
    if theta.dtype not in DTYPES or not theta.is_contiguous():
        raise ValueError(f"theta must be a contiguous float32, bfloat16 or float16 tensor, got {theta.dtype}")
    shape = tuple(theta.shape) if rows is None else (rows.shape[0], *theta.shape[1:])
    _require(out, "out", theta.dtype, shape, theta.device)
    _require(seed, "seed", torch.int64, (), theta.device)
    _require(coef, "coef", torch.float32, (), theta.device)
    if rows is not None:
        _require(rows, "rows", torch.int64, (rows.shape[0],), theta.device)
    for value, name in ((scale, "scale"), (nearest_above, "nearest_above")):
        if value is not None:
            _require(value, name, torch.float32, (), theta.device)
    backend(theta.device.type).scratch(theta, out, tensor_id, seed, coef, scale, nearest_above, rows, dist)


@torch.no_grad()
def block_stats(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of every block: two fp32 tensors of shape (len(blocks),), accumulated in fp64.
    A block of one element has variance 0."""
    mean, var = (torch.empty(len(blocks), dtype=torch.float32, device=blocks.device) for _ in range(2))
    backend(blocks.device.type).block_stats(blocks, mean, var)
    return mean, var


@torch.no_grad()
def noise(
    shape: int | tuple[int, ...], seed: Tensor, tensor_id: int, *, start: int = 0, dist: str = "normal"
) -> Tensor:
    """z of `shape` consecutive elements beginning at global element index `start`: fp32, on the seed's device."""
    _require_dist(dist)
    _require(seed, "seed", torch.int64, (), seed.device)
    out = torch.empty(shape, dtype=torch.float32, device=seed.device)
    backend(seed.device.type).noise(out, seed, tensor_id, start, dist)
    return out


@torch.no_grad()
def words(groups: int, seed: Tensor, tensor_id: int, stream: int, *, first_group: int = 0) -> Tensor:
    """Philox words of `groups` consecutive groups: int32 (groups, 4), the bit patterns of the unsigned words."""
    _require(seed, "seed", torch.int64, (), seed.device)
    out = torch.empty((groups, 4), dtype=torch.int32, device=seed.device)
    backend(seed.device.type).words(out, seed, tensor_id, stream, first_group)
    return out
