"""<x_b, z_kb> for every tensor b of a list and directions k, and statistics of x: what only reads.

Per chunk, sums of fma(x, z, sum) in fp32 in each thread (infinite beyond its range), in fp64 across threads; per
tensor, a sum over its chunks in fp64, in their order.  A chunk is walked once per direction; it has 64K elements, so
all but the first walk read the L2 cache.  Bytes moved per element of a 16-bit tensor: 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zo_kernels.triton_kernels.noise import direction
from zo_kernels.triton_kernels.rounding import widen
from zo_kernels.triton_kernels.span import walk
from zo_kernels.triton_kernels.statistics import add, close_sums, open_sums, pieces, total
from zo_kernels.triton_kernels.table import CHUNKS, FIELDS, FIRST_CHUNK, KIND, TENSOR_ID, open_chunk, open_tensor

_RUNTIME = ["blocks", "chunks", "layouts", "seeds", "count", "dots", "dots_stride", "partial"]


@triton.jit
def _dot(work, sums, place, inside, first, i, BLOCK: tl.constexpr, SIGNS: tl.constexpr):
    source, shift, tensor_id, seed = work
    dot, statistics = sums
    x = tl.load(source + place, mask=inside)
    WIDTH: tl.constexpr = 128 // x.dtype.primitive_bitwidth
    wide = widen(x)
    if inside is not None:
        wide = tl.where(inside, wide, 0.0)
    xs = pieces(wide, BLOCK // WIDTH, WIDTH)
    zs = pieces(direction(first, i, seed, tensor_id, BLOCK, SIGNS), BLOCK // WIDTH, WIDTH)
    tile = xs[0] * zs[0]
    for k in tl.static_range(1, WIDTH):
        tile = tl.fma(xs[k], zs[k], tile)
    return dot + tile, add(statistics, x, shift, inside, BLOCK)


@triton.jit
def _look(work, sums, place, inside, first, i, BLOCK: tl.constexpr, SIGNS: tl.constexpr):
    source, shift = work
    return add(sums, tl.load(source + place, mask=inside), shift, inside, BLOCK)


@triton.jit
def _read_chunk(
    source, tensor_id, span, seeds, count, dots, dots_stride, partial,
    BLOCK: tl.constexpr, SIGNS: tl.constexpr, ALIGNED: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """The statistics ride on the first direction's walk."""
    shift, sums = open_sums(source, span, BLOCK, DIMS, partial is not None)
    if dots is None:
        sums = walk(_look, (source, shift), sums, span, BLOCK, SIGNS, ALIGNED, DIMS)
        close_sums(partial, sums, shift, source, span, DIMS)
    else:
        zero = tl.full((BLOCK * source.dtype.element_ty.primitive_bitwidth // 128,), 0.0, tl.float32)
        done = 0
        if partial is not None:
            work = (source, shift, tensor_id, tl.load(seeds))
            dot, sums = walk(_dot, work, (zero, sums), span, BLOCK, SIGNS, ALIGNED, DIMS)
            tl.store(dots, total(dot.to(tl.float64)))
            close_sums(partial, sums, shift, source, span, DIMS)
            done = 1
        for k in range(done, count):
            work = (source, 0.0, tensor_id, tl.load(seeds + k))
            dot, _ = walk(_dot, work, (zero, ()), span, BLOCK, SIGNS, ALIGNED, DIMS)
            tl.store(dots + k * dots_stride, total(dot.to(tl.float64)))


@triton.jit(do_not_specialize=_RUNTIME)
def read_kernel(
    blocks,  # int64 (blocks, FIELDS): `table`
    chunks,  # int64 (programs, 2)
    layouts,  # int64 (blocks, 2 * DIMS) or None: sizes and strides
    seeds,  # int64 (count,)
    count: tl.int32,
    dots,  # fp64 (count, dots_stride) or None: no directions
    dots_stride: tl.int64,
    partial,  # fp64 (programs, 4) or None: no statistics
    DTYPES: tl.constexpr,  # the dtypes that occur
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    SIGNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    DIMS: tl.constexpr,
):
    _, row, start, span = open_chunk(blocks, chunks, layouts, CHUNK, DIMS)
    tensor_id = tl.load(row + TENSOR_ID)
    if dots is not None:
        dots += tl.program_id(0)
    if partial is not None:
        partial += tl.program_id(0).to(tl.int64) * 4
    if len(DTYPES) > 1:
        kind = tl.load(row + KIND)
    for k in tl.static_range(len(DTYPES)):
        x = open_tensor(row, start, DTYPES[k], ALIGNED, DIMS)
        if len(DTYPES) == 1:
            _read_chunk(x, tensor_id, span, seeds, count, dots, dots_stride, partial, BLOCK, SIGNS, ALIGNED, DIMS)
        else:
            if kind == k:
                _read_chunk(x, tensor_id, span, seeds, count, dots, dots_stride, partial, BLOCK, SIGNS, ALIGNED, DIMS)


@triton.jit(do_not_specialize=["dots", "dots_stride", "blocks", "out"])
def sum_kernel(
    dots,  # fp64 (directions, dots_stride): a value per chunk
    dots_stride: tl.int64,
    blocks,  # int64 (blocks, FIELDS)
    out,  # fp32 (directions, blocks)
    LANES: tl.constexpr,
):
    """One program per block and direction."""
    block, k = tl.program_id(0), tl.program_id(1)
    row = blocks + block.to(tl.int64) * FIELDS
    dots += k * dots_stride + tl.load(row + FIRST_CHUNK)
    chunks = tl.load(row + CHUNKS).to(tl.int32)
    lanes = tl.full((LANES,), 0.0, tl.float64)
    for i in range(0, chunks, LANES):
        c = i + tl.arange(0, LANES)
        lanes += tl.load(dots + c, mask=c < chunks, other=0.0)
    tl.store(out + k * tl.num_programs(0) + block, total(lanes).to(tl.float32))
