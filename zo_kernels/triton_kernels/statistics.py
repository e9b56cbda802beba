"""Mean, unbiased variance, norm and non-finite count of every block, riding on a pass or in a pass of their own.

    per chunk   d = x - shift, shift = mean of the chunk's first elements;  sum d, sum d^2  ->  (n, mean, M2)
    per block   mean = sum n_c mean_c / N,  M2 = sum M2_c + sum n_c (mean_c - mean)^2      (Chan, Golub & LeVeque 1983)

A chunk's sums are fp32 in each thread, first over the 16 bytes that it loads, then over tiles, and fp64 across
threads; all else is fp64, in an order that the tables fix: no atomics, the same bits from run to run.  A constant
tensor has d = 0 exactly, so a variance of exactly 0.  A chunk whose sum of squares is not finite is walked again, in
fp64, to count its non-finite elements (counting in the hot loop would cost three instructions per element); finite
values whose squares overflow fp32 come out right there too.  Deviations below 2^-63, whose squares are fp32
subnormals, lose their digits in var and norm.

Bytes moved per element of a 16-bit tensor: 2 in a pass of their own, 0 when riding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zo_kernels.triton_kernels.noise import HARDWARE
from zo_kernels.triton_kernels.rounding import widen
from zo_kernels.triton_kernels.span import lanes, walk
from zo_kernels.triton_kernels.table import CHUNKS, FIELDS, FIRST_CHUNK

HEAD = tl.constexpr(128)  # elements whose mean is a chunk's shift: one outlier moves it by a hundredth of itself
AGAIN = tl.constexpr(512)  # elements per tile of the walk in fp64


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def total(x):
    """The sum of a tile."""
    N: tl.constexpr = x.shape[0]
    if HARDWARE or N == 1:
        return tl.reduce(x, 0, _plus)
    else:  # the interpreter would reduce one element after the other, 20 us each
        even, odd = tl.split(tl.reshape(x, (N // 2, 2)))
        return total(even + odd)


@triton.jit
def pieces(x, N: tl.constexpr, WIDTH: tl.constexpr):
    """x (N * WIDTH,) as WIDTH tiles (N,), each thread keeping its elements: sums over them move no data."""
    if WIDTH == 1:
        return (tl.reshape(x, (N,)),)
    else:
        even, odd = tl.split(tl.reshape(x, (N * WIDTH // 2, 2)))
        return pieces(even, N, WIDTH // 2) + pieces(odd, N, WIDTH // 2)


@triton.jit
def open_sums(source, span, BLOCK: tl.constexpr, DIMS: tl.constexpr, STATS: tl.constexpr):
    """(shift, sums) for a walk over `source` that is about to begin and may write it; sums is () without STATS."""
    if STATS:
        first, start, skip, left, layout = span
        place, inside = lanes(span, skip, HEAD, DIMS)
        head = widen(tl.load(source + place, mask=inside, other=0.0)).to(tl.float64)
        shift = (total(head) / tl.minimum(left - skip, HEAD).to(tl.float64)).to(tl.float32)
        tl.debug_barrier()  # no warp may write what another has yet to read here
        zero = tl.full((BLOCK * source.dtype.element_ty.primitive_bitwidth // 128,), 0.0, tl.float32)
        return shift, (zero, zero)
    else:
        return 0.0, ()


@triton.jit
def add(sums, x, shift, inside, BLOCK: tl.constexpr):
    """The sums with the elements x of a tile."""
    if len(sums) == 0:
        return ()
    else:
        WIDTH: tl.constexpr = 128 // x.dtype.primitive_bitwidth
        d = widen(x) - shift
        if inside is not None:
            d = tl.where(inside, d, 0.0)
        parts = pieces(d, BLOCK // WIDTH, WIDTH)
        plain, squared = parts[0], parts[0] * parts[0]
        for k in tl.static_range(1, WIDTH):
            plain += parts[k]
            squared = tl.fma(parts[k], parts[k], squared)
        return (sums[0] + plain, sums[1] + squared)


@triton.jit
def _add_exactly(work, sums, place, inside, first, i, BLOCK: tl.constexpr, SIGNS: tl.constexpr):
    source, shift = work
    x = widen(tl.load(source + place, mask=inside, other=0.0))
    finite = tl.abs(x) < float("inf")  # false for a NaN
    d = tl.where(inside & finite, x.to(tl.float64) - shift, 0.0)
    bad = tl.where(inside & (finite == 0), 1.0, 0.0).to(tl.float64)
    return (sums[0] + d, sums[1] + d * d, sums[2] + bad)


@triton.jit
def close_sums(partial, sums, shift, source, span, DIMS: tl.constexpr):
    """Write a chunk's (n, mean, M2, non-finite) to `partial`, fp64 (4,); nothing without statistics."""
    if len(sums) > 0:
        first, start, skip, left, layout = span
        n = (left - skip).to(tl.float64)
        center = shift.to(tl.float64)
        plain, squared = total(sums[0].to(tl.float64)), total(sums[1].to(tl.float64))
        bad = n * 0.0
        if not squared < float("inf"):
            tl.debug_barrier()  # what other warps wrote is read here
            zero = tl.full((AGAIN,), 0.0, tl.float64)
            again = walk(_add_exactly, (source, center), (zero, zero, zero), span, AGAIN, False, False, DIMS)
            plain, squared, bad = total(again[0]), total(again[1]), total(again[2])
        tl.store(partial, n)
        tl.store(partial + 1, center + plain / n)
        tl.store(partial + 2, tl.maximum(squared - plain * (plain / n), 0.0))
        tl.store(partial + 3, bad)


@triton.jit
def _chunk_sums(partial, center, i, chunks, LANES: tl.constexpr):
    """(n, mean - center, M2, non-finite) of LANES chunks from i on; 0 past the last."""
    c = i + tl.arange(0, LANES)
    inside = c < chunks
    row = partial + c * 4
    n = tl.load(row, mask=inside, other=0.0)
    from_center = tl.where(inside, tl.load(row + 1, mask=inside, other=0.0) - center, 0.0)
    m2 = tl.load(row + 2, mask=inside, other=0.0)
    return n, from_center, m2, tl.load(row + 3, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["partial", "blocks", "chunks", "mean", "var", "norm", "nonfinite"])
def statistics_kernel(
    partial,  # fp64 (chunks, 4)
    blocks,  # int64 (blocks, FIELDS) or None: one block, of `chunks` chunks
    chunks: tl.int32,
    mean,  # fp32 (blocks,)
    var,  # fp32 (blocks,)
    norm,  # fp32 (blocks,)
    nonfinite,  # int64 (blocks,)
    LANES: tl.constexpr,
):
    """One program per block."""
    block = tl.program_id(0)
    if blocks is not None:
        row = blocks + block.to(tl.int64) * FIELDS
        partial += tl.load(row + FIRST_CHUNK) * 4
        chunks = tl.load(row + CHUNKS).to(tl.int32)
    center = tl.load(partial + 1, mask=chunks > 0, other=0.0)
    zero = tl.full((LANES,), 0.0, tl.float64)
    counts, sums, bads, squares = zero, zero, zero, zero
    for i in range(0, chunks, LANES):
        n, from_center, _, bad = _chunk_sums(partial, center, i, chunks, LANES)
        counts += n
        sums += n * from_center
        bads += bad
    count = total(counts)
    offset = total(sums) / tl.maximum(count, 1.0)
    for i in range(0, chunks, LANES):
        n, from_center, m2, _ = _chunk_sums(partial, center, i, chunks, LANES)
        squares += m2 + n * (from_center - offset) * (from_center - offset)
    m2_sum, bad_sum = total(squares), total(bads)
    center += offset
    finite = bad_sum == 0
    nan = float("nan")
    tl.store(mean + block, tl.where(finite & (count > 0), center, nan))
    tl.store(var + block, tl.where(finite, m2_sum / tl.maximum(count - 1, 1.0), nan))
    tl.store(norm + block, tl.where(finite, tl.sqrt(m2_sum + count * center * center), nan))
    tl.store(nonfinite + block, bad_sum.to(tl.int64))
