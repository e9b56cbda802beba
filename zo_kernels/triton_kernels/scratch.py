"""out = round(theta + coef * scale * z), theta only read: one launch per tensor, or for some of its rows.

Without rows the tensor counts as one row.  A row is walked in pieces that are cut at multiples of SPAN in the
tensor's element index.  Bytes moved per element of a 16-bit tensor: 4.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zo_kernels.triton_kernels.span import load_directions, masked_span, span

_RUNTIME = ["theta", "out", "rows", "width", "pieces", "tensor_id", "seed", "coef", "scale", "nearest_above"]


@triton.jit
def _piece(
    theta, out, first, skip, left, change, BLOCK: tl.constexpr, SIGNS: tl.constexpr, ALIGNED: tl.constexpr
):
    if ALIGNED:
        span(theta, out, first, left, change, BLOCK, 1, SIGNS)
    else:
        masked_span(theta, out, 0, first, skip, left, None, None, change, BLOCK, 1, SIGNS, 0)


@triton.jit(do_not_specialize=_RUNTIME)
def scratch_kernel(
    theta,  # (numel,) fp32, bf16 or fp16
    out,  # (row count * width,), same dtype
    rows,  # int64 (row count,) or None: one row, number 0
    width: tl.int64,  # elements in a row
    pieces: tl.int32,  # programs per row
    tensor_id: tl.int64,
    seed,  # int64 ()
    coef,  # fp32 ()
    scale,  # fp32 () or None
    nearest_above,  # fp32 () or None: always to nearest
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
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
    if ALIGNED:
        theta = tl.multiple_of(theta + first, 16)
        out = tl.multiple_of(out + place, 16)
    else:
        theta = theta + first
        out = out + place
    sigma = 1.0 if scale is None else tl.load(scale)
    directions = load_directions(seed, coef, sigma, 1, 1)
    to_nearest = (tensor_id, directions, (), ())
    if nearest_above is None:
        _piece(theta, out, first, skip, left, to_nearest, BLOCK, SIGNS, ALIGNED)
    else:
        if tl.abs(directions[0][1]) >= tl.load(nearest_above):
            _piece(theta, out, first, skip, left, to_nearest, BLOCK, SIGNS, ALIGNED)
        else:
            at_random = (tensor_id, directions, (), (directions[0][0],))
            _piece(theta, out, first, skip, left, at_random, BLOCK, SIGNS, ALIGNED)
