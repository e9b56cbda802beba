"""What directions do to a tile:  new = round(decay * old + sum_k step_k * z_k),  step_k = fl32(coef_k * scale_k),

with acc = fma(step_k, z_k, acc) in fp32, in order of k.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zo_kernels.triton_kernels.noise import direction, rounding_bits
from zo_kernels.triton_kernels.rounding import nearest, stochastic, widen


@triton.jit
def load_step(coefs, scales, k):
    """step_k; scales: (pointer to this tensor's scale for direction 0, stride to the next direction's), or ()."""
    if len(scales) == 0:
        return tl.load(coefs + k)
    else:
        return tl.load(coefs + k) * tl.load(scales[0] + k * scales[1])


@triton.jit
def load_directions(seeds, coefs, scales, count, COUNT: tl.constexpr):
    """The directions as `advance` takes them: (pairs, rest).  COUNT > 0: COUNT pairs (seed, step), read once, before
    the walk.  COUNT = 0: any number `count`, read again for every tile."""
    if COUNT > 0:
        pairs = ()
        for k in tl.static_range(COUNT):
            pairs = pairs + ((tl.load(seeds + k), load_step(coefs, scales, k)),)
        return pairs, ()
    else:
        return (), (seeds, coefs, scales, count)


@triton.jit
def load_if(pointer):
    """(value,), or () where there is none."""
    if pointer is None:
        return ()
    else:
        return (tl.load(pointer),)


@triton.jit
def advance(x, change, first, i, BLOCK: tl.constexpr, SIGNS: tl.constexpr):
    """The new values of the tile at global index first + i, whose old values are x, in the dtype of x.

    change: (tensor id, directions of `load_directions`, decay, rounding seed); the last two are tuples of one value,
    or empty: no decay, and rounding to nearest."""
    tensor_id, directions, decay, rounding = change
    pairs, rest = directions
    acc = widen(x)
    for d in tl.static_range(len(decay)):
        acc = acc * decay[d]
    for k in tl.static_range(len(pairs)):
        acc = tl.fma(pairs[k][1], direction(first, i, pairs[k][0], tensor_id, BLOCK, SIGNS), acc)
    if len(rest) > 0:
        seeds, coefs, scales, count = rest
        for k in range(count):
            z = direction(first, i, tl.load(seeds + k), tensor_id, BLOCK, SIGNS)
            acc = tl.fma(load_step(coefs, scales, k), z, acc)
    if len(rounding) == 0:
        return nearest(acc, x.dtype)
    else:
        return stochastic(acc, rounding_bits(first, i, rounding[0], tensor_id, BLOCK), x.dtype)
