"""theta_b = round(decay * theta_b + sum_k coef_k * scale_kb * z'_kb) for every tensor b of a model, in place.

One launch covers all aligned tensors, whatever their dtypes: each program takes one chunk, and the chunk's row in the
table says which tensor that is and where in it.  Bytes moved per element of a 16-bit tensor: 4, for any number of
directions and with the statistics of the new weights.  What changes from step to step is read from device memory:
nothing recompiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zo_kernels.triton_kernels.directions import advance, load_directions, load_if
from zo_kernels.triton_kernels.span import walk
from zo_kernels.triton_kernels.statistics import add, close_sums, open_sums
from zo_kernels.triton_kernels.table import KIND, TENSOR_ID, open_chunk, open_list_form, open_tensor

_RUNTIME = ["blocks", "chunks", "layouts", "scale", "scale_stride", "seeds", "coefs", "count", "decay",
            "rounding_seed", "form_states", "form_values", "value_stride", "partial"]  # fmt: skip


@triton.jit
def _update(work, sums, place, inside, first, i, BLOCK: tl.constexpr, SIGNS: tl.constexpr):
    theta, change, shift = work
    new = advance(tl.load(theta + place, mask=inside), inside, change, first, i, BLOCK, SIGNS)
    tl.store(theta + place, new, mask=inside)
    return add(sums, new, shift, inside, BLOCK)


@triton.jit
def _update_chunk(
    theta, change, span, partial,
    BLOCK: tl.constexpr, SIGNS: tl.constexpr, ALIGNED: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    shift, sums = open_sums(theta, span, BLOCK, DIMS, partial is not None)
    sums = walk(_update, (theta, change, shift), sums, span, BLOCK, SIGNS, ALIGNED, DIMS)
    close_sums(partial, sums, shift, theta, span, DIMS)


@triton.jit(do_not_specialize=_RUNTIME)
def axpy_kernel(
    blocks,  # int64 (blocks, FIELDS): `table`
    chunks,  # int64 (programs, 2)
    layouts,  # int64 (blocks, 2 * DIMS) or None: sizes and strides
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
    partial,  # fp64 (programs, 4) or None: no statistics
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
    tensor_id = tl.load(row + TENSOR_ID)
    scales = () if scale is None else (scale + block, scale_stride)
    directions = load_directions(seeds, coefs, scales, count, COUNT)
    shrink = load_if(decay)
    rounding = load_if(rounding_seed)
    form = open_list_form(form_states, form_values, value_stride, block, start, STATE, ALIGNED)
    if partial is not None:
        partial += tl.program_id(0).to(tl.int64) * 4
    if len(DTYPES) > 1:
        kind = tl.load(row + KIND)
    for k in tl.static_range(len(DTYPES)):
        theta = open_tensor(row, start, DTYPES[k], ALIGNED, DIMS)
        change = (tensor_id, directions, shrink, () if DTYPES[k] == tl.float32 else rounding, form)
        if len(DTYPES) == 1:
            _update_chunk(theta, change, span, partial, BLOCK, SIGNS, ALIGNED, DIMS)
        else:
            if kind == k:
                _update_chunk(theta, change, span, partial, BLOCK, SIGNS, ALIGNED, DIMS)
