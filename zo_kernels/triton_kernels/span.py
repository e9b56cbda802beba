"""The walk that the kernels share: over a span of consecutive elements of one tensor, a tile at a time.

    for every tile:  sums = visit(work, sums, place, inside, first, i, BLOCK, SIGNS)

`visit` is the kernel's own function.  place: where the tile's elements lie, relative to the pointers in `work`; inside:
the mask of those that belong to the span, or None where all do; first (int64) + i (int32): the global index of the
tile's first lane, for the noise; sums: what the visits add up, a tuple of tiles, or () for a visit that only writes.

The aligned walk has no mask in its body, so that every thread moves 16 bytes at a time (a mask with an unknown bound
makes that eight accesses of 2 bytes); only its tail is masked.  The masked walk takes any address and stride.  Both
visit alike, which makes them bit-identical.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(element, layout, DIMS: tl.constexpr):
    """Storage offset of an element in a tensor of DIMS strided dimensions (layout: their sizes, then their strides, in
    elements); DIMS = 0 is contiguous."""
    if DIMS == 0:
        return element
    else:
        place = element * 0
        for d in tl.static_range(DIMS):
            size = tl.load(layout + (DIMS - 1 - d))
            place += element % size * tl.load(layout + (2 * DIMS - 1 - d))
            element = element // size
        return place


@triton.jit
def lanes(span, i, BLOCK: tl.constexpr, DIMS: tl.constexpr):
    """place and inside of BLOCK lanes of any span, from lane i on."""
    first, start, skip, left, layout = span
    lane = i + tl.arange(0, BLOCK)
    return _place(start + lane, layout, DIMS), (lane >= skip) & (lane < left)


@triton.jit
def walk(
    visit: tl.constexpr, work, sums, span, BLOCK: tl.constexpr, SIGNS: tl.constexpr,
    ALIGNED: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """span: (first, start, skip, left, layout): the lanes skip .. left of a walk whose lane 0 has the global index
    `first`, a multiple of 128, and is element `start` from the pointers in `work` (it may lie before the tensor).
    ALIGNED promises start = 0, skip = 0, DIMS = 0 and that the caller hinted the pointers to be multiples of 16 (on an
    argument `tl.multiple_of` has no effect).  Returns the sums."""
    first, start, skip, left, layout = span
    if ALIGNED:
        whole = left // BLOCK * BLOCK
        for i in range(0, whole, BLOCK):
            sums = visit(work, sums, i + tl.arange(0, BLOCK), None, first, i, BLOCK, SIGNS)
        if whole < left:
            place = whole + tl.arange(0, BLOCK)
            sums = visit(work, sums, place, place < left, first, whole, BLOCK, SIGNS)
    else:
        for i in range(0, left, BLOCK):
            place, inside = lanes(span, i, BLOCK, DIMS)
            sums = visit(work, sums, place, inside, first, i, BLOCK, SIGNS)
    return sums
