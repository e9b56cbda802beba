"""Many updates of every tensor of a model, one after the other, while a tile is in registers: one read and one write
of the weights, each update rounded by itself, the bits of as many launches of `axpy_kernel`."""

from __future__ import annotations

import triton
import triton.language as tl

from zo_kernels.triton_kernels.directions import move, shrink
from zo_kernels.triton_kernels.noise import rounding_bits
from zo_kernels.triton_kernels.rounding import nearest, stochastic
from zo_kernels.triton_kernels.span import walk
from zo_kernels.triton_kernels.table import KIND, TENSOR_ID, open_chunk, open_tensor

_RUNTIME = ["blocks", "chunks", "layouts", "scale", "scale_stride", "seeds", "coefs", "ends", "count", "decays",
            "rounding_seeds", "at_random"]  # fmt: skip


@triton.jit
def _replay(work, sums, place, inside, first, i, BLOCK: tl.constexpr, SIGNS: tl.constexpr):
    theta, tensor_id, scales, plan, decays, rounding = work
    seeds, coefs, ends, count = plan
    x = tl.load(theta + place, mask=inside)
    begin = tl.load(ends) * 0
    for p in range(count):
        end = tl.load(ends + p)
        own = scales
        if len(scales) > 0:
            own = (scales[0] + begin * scales[1], scales[1])
        decay = decays
        if len(decays) > 0:
            decay = (tl.load(decays[0] + p),)
        directions = ((), (seeds + begin, coefs + begin, own, (end - begin).to(tl.int32)))
        acc = move(shrink(x, decay), ((), (), ()), directions, tensor_id, first, i, BLOCK, SIGNS)
        new = nearest(acc, x.dtype)
        if len(rounding) > 0:
            bits = rounding_bits(first, i, tl.load(rounding[0] + p), tensor_id, BLOCK)
            new = tl.where(tl.load(rounding[1] + p) != 0, stochastic(acc, bits, x.dtype), new)
        x = new
        begin = end
    tl.store(theta + place, x, mask=inside)
    return sums


@triton.jit(do_not_specialize=_RUNTIME)
def replay_kernel(
    blocks,  # int64 (blocks, FIELDS): `table`
    chunks,  # int64 (programs, 2)
    layouts,  # int64 (blocks, 2 * DIMS) or None: sizes and strides
    scale,  # fp32 (blocks,), (directions, blocks) or None
    scale_stride: tl.int64,  # from one direction's scales to the next's: 0 or blocks
    seeds,  # int64 (directions,): of all passes
    coefs,  # fp32 (directions,)
    ends,  # int64 (count,): one past the last direction of each pass
    count: tl.int32,  # passes
    decays,  # fp32 (count,) or None
    rounding_seeds,  # int64 (count,) or None: all to nearest
    at_random,  # int32 (count,): whether a pass rounds by its seed
    DTYPES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    SIGNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    DIMS: tl.constexpr,
):
    block, row, start, span = open_chunk(blocks, chunks, layouts, CHUNK, DIMS)
    tensor_id = tl.load(row + TENSOR_ID)
    scales = () if scale is None else (scale + block, scale_stride)
    plan = (seeds, coefs, ends, count)
    if len(DTYPES) > 1:
        kind = tl.load(row + KIND)
    for k in tl.static_range(len(DTYPES)):
        theta = open_tensor(row, start, DTYPES[k], ALIGNED, DIMS)
        rounding = () if rounding_seeds is None or DTYPES[k] == tl.float32 else (rounding_seeds, at_random)
        work = (theta, tensor_id, scales, plan, () if decays is None else (decays,), rounding)
        if len(DTYPES) == 1:
            walk(_replay, work, (), span, BLOCK, SIGNS, ALIGNED, DIMS)
        else:
            if kind == k:
                walk(_replay, work, (), span, BLOCK, SIGNS, ALIGNED, DIMS)
