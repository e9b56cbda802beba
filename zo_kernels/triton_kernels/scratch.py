"""out = round(theta + coef * scale * z) and mirror = round(theta - coef * scale * z), theta only read; or theta updated
first, and out and mirror made of what is stored.  One launch per tensor, or for some of its rows.

Without rows the tensor counts as one row.  A row is walked in pieces that are cut at multiples of SPAN in the
tensor's element index.  Bytes moved per element of a 16-bit tensor: 4; 2 more with a mirror, 2 more with an update.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zo_kernels.triton_kernels.directions import advance, load_directions, load_if, load_step
from zo_kernels.triton_kernels.noise import direction, rounding_bits
from zo_kernels.triton_kernels.rounding import nearest, stochastic, widen
from zo_kernels.triton_kernels.span import walk
from zo_kernels.triton_kernels.statistics import add, close_sums, open_sums

_RUNTIME = ["theta", "out", "mirror", "rows", "width", "pieces", "tensor_id", "seeds", "coefs", "scale", "scale_stride",
            "count", "decay", "rounding_seed", "seed", "coef", "probe_scale", "nearest_above", "partial"]  # fmt: skip


@triton.jit
def _probe(work, sums, place, inside, first, i, BLOCK: tl.constexpr, SIGNS: tl.constexpr):
    theta, outs, change, probe, shift = work
    tensor_id, seed, step, rounding = probe
    x = tl.load(theta + place, mask=inside)
    if len(change) > 0:
        x = advance(x, change, first, i, BLOCK, SIGNS)
        tl.store(theta + place, x, mask=inside)
    z = direction(first, i, seed, tensor_id, BLOCK, SIGNS)
    if len(rounding) > 0:
        r = rounding_bits(first, i, rounding[0], tensor_id, BLOCK)
    for sign in tl.static_range(len(outs)):
        acc = tl.fma(step if sign == 0 else -step, z, widen(x))
        new = nearest(acc, x.dtype) if len(rounding) == 0 else stochastic(acc, r, x.dtype)
        tl.store(outs[sign] + place, new, mask=inside)
    return add(sums, x, shift, inside, BLOCK)


@triton.jit
def _probe_span(
    theta, outs, change, probe, span, partial, BLOCK: tl.constexpr, SIGNS: tl.constexpr, ALIGNED: tl.constexpr
):
    shift, sums = open_sums(theta, span, BLOCK, 0, partial is not None)
    sums = walk(_probe, (theta, outs, change, probe, shift), sums, span, BLOCK, SIGNS, ALIGNED, 0)
    close_sums(partial, sums, shift, theta, span, 0)


@triton.jit(do_not_specialize=_RUNTIME)
def scratch_kernel(
    theta,  # (numel,) fp32, bf16 or fp16
    out,  # (row count * width,), same dtype
    mirror,  # like out, or None
    rows,  # int64 (row count,) or None: one row, number 0
    width: tl.int64,  # elements in a row
    pieces: tl.int32,  # programs per row
    tensor_id: tl.int64,
    seeds,  # int64 (count,) or None: no update
    coefs,  # fp32 (count,)
    scale,  # fp32 (), (count,) or None
    scale_stride: tl.int64,  # 0 or 1
    count: tl.int32,
    decay,  # fp32 () or None
    rounding_seed,  # int64 () or None: the update rounds to nearest
    seed,  # int64 (): the probe's
    coef,  # fp32 ()
    probe_scale,  # fp32 () or None
    nearest_above,  # fp32 () or None: the scratch is always rounded to nearest
    partial,  # fp64 (programs, 4) or None: no statistics; never with rows
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,  # `count` where the update's directions fit in registers, else 0
    SIGNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    program = tl.program_id(0)
    i = (program // pieces).to(tl.int64)
    begin = i * 0 if rows is None else tl.load(rows + i) * width
    piece = begin // SPAN + program % pieces
    first = tl.maximum(piece * SPAN, begin // 128 * 128)
    # A row's last piece may be empty: they are as many as the worst-placed row needs.
    left = tl.maximum(tl.minimum((piece + 1) * SPAN, begin + width) - first, 0).to(tl.int32)
    skip = tl.maximum(begin - first, 0).to(tl.int32)
    place = i * width + (first - begin)
    theta += first
    out += place
    if mirror is not None:
        mirror += place
    if ALIGNED:
        theta = tl.multiple_of(theta, 16)
        out = tl.multiple_of(out, 16)
        if mirror is not None:
            mirror = tl.multiple_of(mirror, 16)
    outs = (out,) if mirror is None else (out, mirror)
    span = (first, 0, skip, left, ())
    if partial is not None:
        partial += program.to(tl.int64) * 4
    change = ()
    if seeds is not None:
        scales = () if scale is None else (scale, scale_stride)
        directions = load_directions(seeds, coefs, scales, count, COUNT)
        change = (tensor_id, directions, load_if(decay), load_if(rounding_seed))
    probe_seed, step = tl.load(seed), load_step(coef, () if probe_scale is None else (probe_scale, 0), 0)
    to_nearest = (tensor_id, probe_seed, step, ())
    if nearest_above is None:
        _probe_span(theta, outs, change, to_nearest, span, partial, BLOCK, SIGNS, ALIGNED)
    else:
        if tl.abs(step) >= tl.load(nearest_above):
            _probe_span(theta, outs, change, to_nearest, span, partial, BLOCK, SIGNS, ALIGNED)
        else:
            at_random = (tensor_id, probe_seed, step, (probe_seed,))
            _probe_span(theta, outs, change, at_random, span, partial, BLOCK, SIGNS, ALIGNED)
