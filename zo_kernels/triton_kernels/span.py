"""The walk that the kernels share: a span of consecutive elements of one tensor,

    target = round(decay * source + sum_k step_k * z_k)

with acc = fma(step_k, z_k, acc) in fp32, in order of k.  `span` is for contiguous tensors on 16-byte
boundaries: its body has no masks, so that every thread moves 16 bytes at a time (a mask with an unknown bound
makes that eight accesses of 2 bytes); only the tail is masked.  `masked_span` takes the rest.  Both call
`_advance`, which makes them bit-identical.

change, in all of them: (tensor id, directions of `load_directions`, decay, rounding); decay and rounding are
tuples of one value, or empty: no decay, and rounding to nearest instead of by that seed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zo_kernels.triton_kernels.noise import direction, rounding_bits
from zo_kernels.triton_kernels.rounding import nearest, stochastic, widen


@triton.jit
def load_directions(seeds, coefs, scale, count, COUNT: tl.constexpr):
    """The directions as `_advance` takes them.  COUNT > 0: COUNT pairs (seed, step), step = fl32(coef *
    scale), read once, before the walk.  COUNT = 0: any number `count`, read again for every tile."""
    if COUNT > 0:
        pairs = ()
        for k in tl.static_range(COUNT):
            pairs = pairs + ((tl.load(seeds + k), tl.load(coefs + k) * scale),)
        return pairs
    else:
        return (seeds, coefs, scale, count)


@triton.jit
def _advance(
    x, first, i, change, DTYPE: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, SIGNS: tl.constexpr
):
    """The new values of the tile at global index first + i, whose old values are x."""
    tensor_id, directions, decay, rounding = change
    acc = widen(x)
    for d in tl.static_range(len(decay)):
        acc = acc * decay[d]
    if COUNT > 0:
        for k in tl.static_range(COUNT):
            z = direction(first, i, directions[k][0], tensor_id, BLOCK, SIGNS)
            acc = tl.fma(directions[k][1], z, acc)
    else:
        seeds, coefs, scale, count = directions
        for k in range(count):
            z = direction(first, i, tl.load(seeds + k), tensor_id, BLOCK, SIGNS)
            acc = tl.fma(tl.load(coefs + k) * scale, z, acc)
    if len(rounding) == 0:
        return nearest(acc, DTYPE)
    else:
        return stochastic(acc, rounding_bits(first, i, rounding[0], tensor_id, BLOCK), DTYPE)


@triton.jit
def span(source, target, first, left, change, BLOCK: tl.constexpr, COUNT: tl.constexpr, SIGNS: tl.constexpr):
    """source, target: pointers to the first element, which the caller hints to be multiples of 16 (on an
    argument `tl.multiple_of` has no effect); first: its global index, a multiple of 128 (int64); left: the
    number of elements (int32)."""
    DTYPE: tl.constexpr = target.dtype.element_ty
    whole = left // BLOCK * BLOCK
    for i in range(0, whole, BLOCK):
        off = i + tl.arange(0, BLOCK)
        new = _advance(tl.load(source + off), first, i, change, DTYPE, BLOCK, COUNT, SIGNS)
        tl.store(target + off, new)
    if whole < left:
        off = whole + tl.arange(0, BLOCK)
        old = tl.load(source + off, mask=off < left, other=0.0)
        new = _advance(old, first, whole, change, DTYPE, BLOCK, COUNT, SIGNS)
        tl.store(target + off, new, mask=off < left)


@triton.jit
def _place(element, shape, stride, DIMS: tl.constexpr):
    """Storage offset of an element, in a tensor of DIMS strided dimensions; DIMS = 0 is contiguous."""
    if DIMS == 0:
        return element
    else:
        place = element * 0
        for d in tl.static_range(DIMS):
            size = tl.load(shape + (DIMS - 1 - d))
            place += element % size * tl.load(stride + (DIMS - 1 - d))
            element = element // size
        return place


@triton.jit
def masked_span(
    source, target, start, first, skip, left, shape, stride, change,
    BLOCK: tl.constexpr, COUNT: tl.constexpr, SIGNS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Any alignment and strides: lanes skip .. left of a walk whose lane 0 is element `start` (it may be
    negative) of the tensors at `source` and `target`, and has the global index `first`, a multiple of 128."""
    DTYPE: tl.constexpr = target.dtype.element_ty
    for i in range(0, left, BLOCK):
        off = i + tl.arange(0, BLOCK)
        inside = (off >= skip) & (off < left)
        place = _place(start + off, shape, stride, DIMS)
        old = tl.load(source + place, mask=inside, other=0.0)
        new = _advance(old, first, i, change, DTYPE, BLOCK, COUNT, SIGNS)
        tl.store(target + place, new, mask=inside)
