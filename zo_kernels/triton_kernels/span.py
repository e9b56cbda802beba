"""The walk that all in-place and scratch kernels share: a span of consecutive elements of one tensor,

    target = round(decay * source + sum_k step_k * z_k),   acc = fma(step_k, z_k, acc) in fp32, in order of k

The body has no masks, so that it reads and writes 16 bytes per thread; only the tail is masked.  A tensor that is
not 16-byte aligned or starts off a multiple of 128 takes the masked form throughout.  All forms call `_advance`,
which makes them bit-identical.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zo_kernels.triton_kernels.noise import direction, rounding_bits
from zo_kernels.triton_kernels.rounding import nearest, stochastic


@triton.jit
def load_directions(seeds, coefs, scale, COUNT: tl.constexpr):
    """The first COUNT (seed, step) pairs, step = fl32(coef * scale), read once before the walk."""
    pairs = ()
    for k in tl.static_range(COUNT):
        pairs = pairs + ((tl.load(seeds + k), tl.load(coefs + k) * scale),)
    return pairs


@triton.jit
def _advance(x, first, tensor_id, pairs, seeds, coefs, scale, count, decay, rounding_seed,
             DTYPE: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, RADEMACHER: tl.constexpr):  # fmt: skip
    acc = x.to(tl.float32)
    if decay is not None:
        acc = acc * decay
    if COUNT > 0:
        for k in tl.static_range(COUNT):
            acc = tl.fma(pairs[k][1], direction(first, pairs[k][0], tensor_id, BLOCK, RADEMACHER), acc)
    else:
        for k in range(count):
            z = direction(first, tl.load(seeds + k), tensor_id, BLOCK, RADEMACHER)
            acc = tl.fma(tl.load(coefs + k) * scale, z, acc)
    if rounding_seed is None:
        return nearest(acc, DTYPE)
    else:
        return stochastic(acc, rounding_bits(first, rounding_seed, tensor_id, BLOCK), DTYPE)
