"""Updates by a rule that keeps state (`zo_kernels.rules`, whose equations these are): theta and its states of every
tensor of a model, in place, in one launch.

Bytes moved per element of a 16-bit tensor: 4, and 8 for every state.  Layout of the walk: `axpy`; the states are
contiguous, so a lane's place in them is its number, whatever theta's strides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zo_kernels.triton_kernels.directions import (
    load_directions,
    load_if,
    load_state,
    load_step,
    move,
    open_form,
    rounded,
    shrink,
)
from zo_kernels.triton_kernels.noise import direction
from zo_kernels.triton_kernels.span import walk
from zo_kernels.triton_kernels.table import (
    KIND,
    TENSOR_ID,
    open_chunk,
    open_list_form,
    open_states,
    open_tensor,
)

_RUNTIME = ["blocks", "chunks", "layouts", "states", "states_stride", "numbers", "keep", "scale", "scale_stride",
            "seeds", "coefs", "count", "decay", "rounding_seed", "form_states", "form_values",
            "value_stride"]  # fmt: skip


@triton.jit
def _sign(x):
    return tl.where(x > 0.0, 1.0, 0.0) - tl.where(x < 0.0, 1.0, 0.0)


@triton.jit
def _average(beta, m, e):
    return tl.fma(beta, m, (1.0 - beta) * e)


@triton.jit
def _open(work, place, inside, i, BLOCK: tl.constexpr):
    """(theta as it is read, theta in fp32 after the decay, the states) of a tile."""
    theta, states, _, _, change = work
    x = tl.load(theta + place, mask=inside)
    old = ()
    for s in tl.static_range(len(states)):
        old = old + (load_state(states[s] + i + tl.arange(0, BLOCK), inside),)
    return x, shrink(x, change[2]), old


@triton.jit
def _gradient(work, x, inside, first, i, BLOCK: tl.constexpr, SIGNS: tl.constexpr):
    """The sum of the directions, in their form."""
    tensor_id, directions, _, _, form = work[4]
    opened = open_form(form, x, inside, i, BLOCK)
    return move(tl.full((BLOCK,), 0.0, tl.float32), opened, directions, tensor_id, first, i, BLOCK, SIGNS)


@triton.jit
def _close(work, acc, new, place, inside, first, i, BLOCK: tl.constexpr):
    theta, states, _, _, change = work
    tensor_id, _, _, rounding, _ = change
    dtype: tl.constexpr = theta.dtype.element_ty
    tl.store(theta + place, rounded(acc, rounding, tensor_id, first, i, BLOCK, dtype), mask=inside)
    for s in tl.static_range(len(states)):
        tl.store(states[s] + i + tl.arange(0, BLOCK), new[s], mask=inside)


@triton.jit
def _momentum(work, sums, place, inside, first, i, BLOCK: tl.constexpr, SIGNS: tl.constexpr):
    n = work[2]
    x, acc, old = _open(work, place, inside, i, BLOCK)
    m = tl.fma(n[1], old[0], _gradient(work, x, inside, first, i, BLOCK, SIGNS))
    _close(work, tl.fma(-n[0], m, acc), (m,), place, inside, first, i, BLOCK)
    return sums


@triton.jit
def _adam(work, sums, place, inside, first, i, BLOCK: tl.constexpr, SIGNS: tl.constexpr):
    n = work[2]
    x, acc, old = _open(work, place, inside, i, BLOCK)
    e = _gradient(work, x, inside, first, i, BLOCK, SIGNS)
    m, v = _average(n[1], old[0], e), _average(n[2], old[1], e * e)
    change = tl.div_rn(tl.div_rn(n[0], n[4]) * m, tl.sqrt_rn(tl.div_rn(v, n[5])) + n[3])
    _close(work, acc - change, (m, v), place, inside, first, i, BLOCK)
    return sums


@triton.jit
def _adamm(work, sums, place, inside, first, i, BLOCK: tl.constexpr, SIGNS: tl.constexpr):
    n = work[2]
    x, acc, old = _open(work, place, inside, i, BLOCK)
    e = _gradient(work, x, inside, first, i, BLOCK, SIGNS)
    m, v = _average(n[1], old[0], e), _average(n[2], old[1], e * e)
    largest = tl.where(v > old[2], v, old[2])
    change = tl.div_rn(n[0] * m, tl.sqrt_rn(largest) + n[3])
    _close(work, acc - change, (m, v, largest), place, inside, first, i, BLOCK)
    return sums


@triton.jit
def _sign_of_gradient(work, sums, place, inside, first, i, BLOCK: tl.constexpr, SIGNS: tl.constexpr):
    n = work[2]
    x, acc, _ = _open(work, place, inside, i, BLOCK)
    e = _gradient(work, x, inside, first, i, BLOCK, SIGNS)
    _close(work, tl.fma(-n[0], _sign(e), acc), (), place, inside, first, i, BLOCK)
    return sums


@triton.jit
def _sign_of_average(work, sums, place, inside, first, i, BLOCK: tl.constexpr, SIGNS: tl.constexpr):
    n = work[2]
    x, acc, old = _open(work, place, inside, i, BLOCK)
    m = _average(n[1], old[0], _gradient(work, x, inside, first, i, BLOCK, SIGNS))
    _close(work, tl.fma(-n[0], _sign(m), acc), (m,), place, inside, first, i, BLOCK)
    return sums


@triton.jit
def _curvature(work, sums, place, inside, first, i, BLOCK: tl.constexpr, SIGNS: tl.constexpr):
    n = work[2]
    tensor_id, directions, _, _, _ = work[4]
    pairs, rest = directions
    x, acc, old = _open(work, place, inside, i, BLOCK)
    seed = pairs[0][0] if len(pairs) > 0 else tl.load(rest[0])
    z = direction(first, i, seed, tensor_id, BLOCK, SIGNS)
    h = tl.fma(1.0 - n[0], old[0], (n[0] * n[1]) * ((z * z) * old[0]))
    acc = move(acc, ((tl.sqrt_rn(h),), (), ()), directions, tensor_id, first, i, BLOCK, SIGNS)
    _close(work, acc, (h,), place, inside, first, i, BLOCK)
    return sums


@triton.jit
def _shifted_mean(work, sums, place, inside, first, i, BLOCK: tl.constexpr, SIGNS: tl.constexpr):
    n, weights = work[2], work[3]
    tensor_id, directions, _, _, _ = work[4]
    pairs, rest = directions
    x, acc, old = _open(work, place, inside, i, BLOCK)
    mu = old[0]
    acc = tl.fma(n[0], mu, acc)
    for k in tl.static_range(len(pairs)):
        z = direction(first, i, pairs[k][0], tensor_id, BLOCK, SIGNS)
        acc = tl.fma(weights[0][k][1], z, acc)
        mu = tl.fma(pairs[k][1], z, mu)
    if len(rest) > 0:
        seeds, coefs, scales, count = rest
        for k in range(count):
            z = direction(first, i, tl.load(seeds + k), tensor_id, BLOCK, SIGNS)
            acc = tl.fma(load_step(weights[1][1], scales, k), z, acc)
            mu = tl.fma(load_step(coefs, scales, k), z, mu)
    _close(work, acc, (mu,), place, inside, first, i, BLOCK)
    return sums


VISITS = {
    "momentum": _momentum,
    "adam": _adam,
    "adamm": _adamm,
    "sign": _sign_of_gradient,
    "sign-ema": _sign_of_average,
    "curvature": _curvature,
    "shifted-mean": _shifted_mean,
}  # what `state_kernel` is compiled for


@triton.jit
def _load_numbers(numbers, COUNT: tl.constexpr):
    found = ()
    for k in tl.static_range(COUNT):
        found = found + (tl.load(numbers + k),)
    return found


@triton.jit(do_not_specialize=_RUNTIME)
def state_kernel(
    blocks,  # int64 (blocks, FIELDS): `table`
    chunks,  # int64 (programs, 2)
    layouts,  # int64 (blocks, 2 * DIMS) or None: sizes and strides
    states,  # int64 (STATES, blocks): addresses
    states_stride: tl.int64,
    numbers,  # fp32 (NUMBERS,), with weights (NUMBERS + count,)
    keep,  # bool () or None: false leaves all as it is
    scale,  # fp32 (blocks,), (count, blocks) or None
    scale_stride: tl.int64,  # from one direction's scales to the next's: 0 or blocks
    seeds,  # int64 (count,)
    coefs,  # fp32 (count,)
    count: tl.int32,
    decay,  # fp32 () or None
    rounding_seed,  # int64 () or None: to nearest
    form_states,  # int64 (blocks,): addresses of h or mu, or None
    form_values,  # fp32 (blocks,) limits, () c, or None
    value_stride: tl.int32,
    VISIT: tl.constexpr,  # one of VISITS
    WEIGHTS: tl.constexpr,  # whether there are weights
    STATES: tl.constexpr,
    NUMBERS: tl.constexpr,
    STATE: tl.constexpr,  # dtype of h or mu
    DTYPES: tl.constexpr,  # the dtypes that occur
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,  # `count` where the directions fit in registers, else 0
    SIGNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    DIMS: tl.constexpr,
):
    block, row, start, span = open_chunk(blocks, chunks, layouts, CHUNK, DIMS)
    if keep is not None:
        first, begin, skip, left, layout = span
        span = (first, begin, skip, tl.where(tl.load(keep), left, 0), layout)
    tensor_id = tl.load(row + TENSOR_ID)
    scales = () if scale is None else (scale + block, scale_stride)
    directions = load_directions(seeds, coefs, scales, count, COUNT)
    weights = load_directions(seeds, numbers + NUMBERS, scales, count, COUNT) if WEIGHTS else ()
    n = _load_numbers(numbers, NUMBERS)
    opened = open_states(states + block, states_stride, start, STATES, ALIGNED)
    form = open_list_form(form_states, form_values, value_stride, block, start, STATE, ALIGNED)
    shrinking, rounding = load_if(decay), load_if(rounding_seed)
    if len(DTYPES) > 1:
        kind = tl.load(row + KIND)
    for k in tl.static_range(len(DTYPES)):
        theta = open_tensor(row, start, DTYPES[k], ALIGNED, DIMS)
        change = (tensor_id, directions, shrinking, () if DTYPES[k] == tl.float32 else rounding, form)
        work = (theta, opened, n, weights, change)
        if len(DTYPES) == 1:
            walk(VISIT, work, (), span, BLOCK, SIGNS, ALIGNED, DIMS)
        else:
            if kind == k:
                walk(VISIT, work, (), span, BLOCK, SIGNS, ALIGNED, DIMS)
