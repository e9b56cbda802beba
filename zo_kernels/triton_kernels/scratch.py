"""out = round(theta + sum_k step_k * z'_k) and mirror = round(theta - sum_k step_k * z'_k), theta only read; or theta
updated first, and out and mirror made of what is stored.  One launch per tensor, or for some of its rows.

Without rows the tensor, or a shard that begins at `offset`, counts as one row.  A row is walked in pieces that are cut
at multiples of SPAN in the tensor's element index.  Bytes moved per element of a 16-bit tensor: 4; 2 more with a
mirror, 2 more with an update.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zo_kernels.triton_kernels.directions import (
    advance,
    load_directions,
    load_form,
    load_if,
    load_step,
    open_form,
    shaped,
)
from zo_kernels.triton_kernels.noise import direction, rounding_bits
from zo_kernels.triton_kernels.rounding import nearest, stochastic, widen
from zo_kernels.triton_kernels.span import walk
from zo_kernels.triton_kernels.statistics import add, close_sums, open_sums

_RUNTIME = ["theta", "out", "mirror", "rows", "width", "offset", "pieces", "tensor_id", "seeds", "coefs", "scale",
            "scale_stride", "count", "decay", "rounding_seed", "probe_seeds", "probe_coefs", "probe_scale",
            "probe_stride", "probe_count", "nearest_above", "state", "value", "partial"]  # fmt: skip


@triton.jit
def _both(accs, step, z):
    """(acc + step z, acc - step z), or the first alone."""
    if len(accs) == 1:
        return (tl.fma(step, z, accs[0]),)
    else:
        return tl.fma(step, z, accs[0]), tl.fma(-step, z, accs[1])


@triton.jit
def _probe(work, sums, place, inside, first, i, BLOCK: tl.constexpr, SIGNS: tl.constexpr):
    theta, outs, change, probe, shift = work
    tensor_id, directions, rounding, form = probe
    pairs, rest = directions
    x = tl.load(theta + place, mask=inside)
    if len(change) > 0:
        x = advance(x, inside, change, first, i, BLOCK, SIGNS)
        tl.store(theta + place, x, mask=inside)
    accs = (widen(x),) if len(outs) == 1 else (widen(x), widen(x))
    opened = open_form(form, x, inside, i, BLOCK)
    mean = opened[2]
    if len(mean) > 0:
        accs = _both(accs, mean[1], mean[0])
    for k in tl.static_range(len(pairs)):
        accs = _both(accs, pairs[k][1], shaped(direction(first, i, pairs[k][0], tensor_id, BLOCK, SIGNS), opened))
    if len(rest) > 0:
        seeds, coefs, scales, count = rest
        for k in range(count):
            z = shaped(direction(first, i, tl.load(seeds + k), tensor_id, BLOCK, SIGNS), opened)
            accs = _both(accs, load_step(coefs, scales, k), z)
    if len(rounding) > 0:
        r = rounding_bits(first, i, rounding[0], tensor_id, BLOCK)
    for sign in tl.static_range(len(outs)):
        new = nearest(accs[sign], x.dtype) if len(rounding) == 0 else stochastic(accs[sign], r, x.dtype)
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
    offset: tl.int64,  # global index of theta's first element; 0 with rows
    pieces: tl.int32,  # programs per row
    tensor_id: tl.int64,
    seeds,  # int64 (count,) or None: no update
    coefs,  # fp32 (count,)
    scale,  # fp32 (), (count,) or None
    scale_stride: tl.int64,  # 0 or 1
    count: tl.int32,
    decay,  # fp32 () or None
    rounding_seed,  # int64 () or None: the update rounds to nearest
    probe_seeds,  # int64 (probe_count,)
    probe_coefs,  # fp32 (probe_count,)
    probe_scale,  # fp32 (), (probe_count,) or None
    probe_stride: tl.int64,  # 0 or 1
    probe_count: tl.int32,
    nearest_above,  # fp32 () or None: the scratch is always rounded to nearest
    state,  # h or mu of the probe's form, like theta, or None
    value,  # fp32 (): its limit or c, or None
    partial,  # fp64 (programs, 4) or None: no statistics; never with rows
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,  # `count` where the update's directions fit in registers, else 0
    PROBES: tl.constexpr,  # and `probe_count`
    SIGNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    program = tl.program_id(0)
    i = (program // pieces).to(tl.int64)
    begin = offset if rows is None else tl.load(rows + i) * width
    piece = begin // SPAN + program % pieces
    first = tl.maximum(piece * SPAN, begin // 128 * 128)
    # A row's last piece may be empty: they are as many as the worst-placed row needs.
    left = tl.maximum(tl.minimum((piece + 1) * SPAN, begin + width) - first, 0).to(tl.int32)
    skip = tl.maximum(begin - first, 0).to(tl.int32)
    place = i * width + (first - begin)
    theta += first - offset
    if state is not None:
        state += first - offset
    out += place
    if mirror is not None:
        mirror += place
    if ALIGNED:
        theta = tl.multiple_of(theta, 16)
        out = tl.multiple_of(out, 16)
        if mirror is not None:
            mirror = tl.multiple_of(mirror, 16)
        if state is not None:
            state = tl.multiple_of(state, 16)
    outs = (out,) if mirror is None else (out, mirror)
    span = (first, 0, skip, left, ())
    if partial is not None:
        partial += program.to(tl.int64) * 4
    change = ()
    if seeds is not None:
        scales = () if scale is None else (scale, scale_stride)
        directions = load_directions(seeds, coefs, scales, count, COUNT)
        change = (tensor_id, directions, load_if(decay), load_if(rounding_seed), ((), (), ()))
    scales = () if probe_scale is None else (probe_scale, probe_stride)
    probes, form = load_directions(probe_seeds, probe_coefs, scales, probe_count, PROBES), load_form(state, value)
    to_nearest = (tensor_id, probes, (), form)
    if nearest_above is None:
        _probe_span(theta, outs, change, to_nearest, span, partial, BLOCK, SIGNS, ALIGNED)
    else:
        if tl.abs(load_step(probe_coefs, scales, 0)) >= tl.load(nearest_above):
            _probe_span(theta, outs, change, to_nearest, span, partial, BLOCK, SIGNS, ALIGNED)
        else:
            at_random = (tensor_id, probes, (tl.load(probe_seeds),), form)
            _probe_span(theta, outs, change, at_random, span, partial, BLOCK, SIGNS, ALIGNED)
