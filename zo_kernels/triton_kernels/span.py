"""The walk that the kernels share: a span of consecutive elements of one tensor,

    target = round(decay * source + sum_k step_k * z_k),   acc = fma(step_k, z_k, acc) in fp32, in order of k

`span` is for contiguous tensors on 16-byte boundaries: its body has no masks, so that every thread moves 16 bytes at
a time (a mask whose bound is unknown makes that sixteen accesses of 2 bytes); only the tail is masked.  `masked_span`
takes the rest.  Both call `_advance`, which makes them bit-identical.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zo_kernels.triton_kernels.noise import direction, rounding_bits
from zo_kernels.triton_kernels.rounding import nearest, stochastic


@triton.jit
def load_directions(seeds, coefs, scale, COUNT: tl.constexpr):
    """((seed, step), ...) of the first COUNT directions, step = fl32(coef * scale): read once, before the walk."""
    pairs = ()
    for k in tl.static_range(COUNT):
        pairs = pairs + ((tl.load(seeds + k), tl.load(coefs + k) * scale),)
    return pairs


@triton.jit
def _advance(x, first, i, tensor_id, pairs, more, decay, rounding_seed,
             DTYPE: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, RADEMACHER: tl.constexpr):  # fmt: skip
    """The new values of a tile; x: its old ones, first: the global index of its first element.

    pairs: COUNT directions in registers; more: (seeds, coefs, count, scale), directions COUNT .. count in memory."""
    acc = x.to(tl.float32)
    if decay is not None:
        acc = acc * decay
    for k in tl.static_range(COUNT):
        z = direction(first, i, pairs[k][0], tensor_id, BLOCK, RADEMACHER)
        acc = tl.fma(pairs[k][1], z, acc)
    if more is not None:
        for k in range(COUNT, more[2]):
            z = direction(first, i, tl.load(more[0] + k), tensor_id, BLOCK, RADEMACHER)
            acc = tl.fma(tl.load(more[1] + k) * more[3], z, acc)
    if rounding_seed is None:
        return nearest(acc, DTYPE)
    else:
        return stochastic(acc, rounding_bits(first, i, rounding_seed, tensor_id, BLOCK), DTYPE)


@triton.jit
def span(source, target, first, left, tensor_id, pairs, more, decay, rounding_seed,
         DTYPE: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, RADEMACHER: tl.constexpr):  # fmt: skip
    """source, target: pointers to the span's first element, 16-byte aligned; first: its global index, a multiple
    of 128; left: elements in the span (int32)."""
    source = tl.multiple_of(source, 16)
    target = tl.multiple_of(target, 16)
    whole = left // BLOCK * BLOCK
    for i in range(0, whole, BLOCK):
        off = i + tl.arange(0, BLOCK)
        new = _advance(tl.load(source + off), first, i, tensor_id, pairs, more, decay, rounding_seed,
                       DTYPE, BLOCK, COUNT, RADEMACHER)  # fmt: skip
        tl.store(target + off, new)
    if whole < left:
        off = whole + tl.arange(0, BLOCK)
        inside = off < left
        new = _advance(tl.load(source + off, mask=inside, other=0.0), first, whole, tensor_id, pairs, more, decay,
                       rounding_seed, DTYPE, BLOCK, COUNT, RADEMACHER)  # fmt: skip
        tl.store(target + off, new, mask=inside)


@triton.jit
def _place(element, shape, stride, DIMS: tl.constexpr):
    """Storage offset of an element index of a strided tensor; DIMS = 0 is a contiguous one."""
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
def masked_span(source, target, start, first, skip, left, shape, stride, tensor_id, pairs, more, decay, rounding_seed,
                DTYPE: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, RADEMACHER: tl.constexpr,
                DIMS: tl.constexpr):  # fmt: skip
    """Any alignment and strides.  source, target: pointers to the tensor's element 0; start: the element (int64, may
    be negative) that lane 0 stands for, first: its global index, a multiple of 128; lanes skip .. left are in the
    span."""
    for i in range(0, left, BLOCK):
        off = i + tl.arange(0, BLOCK)
        inside = (off >= skip) & (off < left)
        place = _place(start + off, shape, stride, DIMS)
        new = _advance(tl.load(source + place, mask=inside, other=0.0), first, i, tensor_id, pairs, more, decay,
                       rounding_seed, DTYPE, BLOCK, COUNT, RADEMACHER)  # fmt: skip
        tl.store(target + place, new, mask=inside)
