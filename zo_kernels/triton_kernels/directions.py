"""What directions do to a tile:  new = round(decay * old + sum_k step_k * z'_k),  step_k = fl32(coef_k * scale_k),

with acc = fma(step_k, z'_k, acc) in fp32, in order of k; z' is z, or what its form makes of it (`zo_kernels.forms`).
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
    """The directions as `move` takes them: (pairs, rest).  COUNT > 0: COUNT pairs (seed, step), read once, before the
    walk.  COUNT = 0: any number `count`, read again for every tile."""
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
def load_form(state, value):
    """A form as (h, limit, mean), two of the three empty, all of a plain one.  state: pointer to the element of h or mu
    at lane 0 of the walk, or None; value: pointer to the limit or c, or None."""
    if state is None:
        return (), load_if(value), ()
    else:
        if value is None:
            return (state,), (), ()
        else:
            return (), (), (state, tl.load(value))


@triton.jit
def load_state(pointer, inside):
    """Elements of a state; outside of the span ones, for which every quotient is finite."""
    if inside is None:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=inside, other=1.0)


@triton.jit
def open_form(form, x, inside, i, BLOCK: tl.constexpr):
    """What the directions of a tile take of their form: its roots of h, which elements of x are below the limit, its
    mean and c; each a tuple, empty where there is none."""
    h, limit, mean = form
    lane = i + tl.arange(0, BLOCK)
    if len(h) > 0:
        return (tl.sqrt_rn(load_state(h[0] + lane, inside)),), (), ()
    else:
        if len(limit) > 0:
            return (), (tl.abs(widen(x)) <= limit[0],), ()
        else:
            if len(mean) > 0:
                return (), (), (widen(load_state(mean[0] + lane, inside)), mean[1])
            else:
                return (), (), ()


@triton.jit
def shaped(z, form):
    """z' of z, by what `open_form` gave."""
    roots, below, _ = form
    if len(roots) > 0:
        return tl.div_rn(z, roots[0])
    else:
        if len(below) > 0:
            return tl.where(below[0], z, 0.0)
        else:
            return z


@triton.jit
def move(acc, form, directions, tensor_id, first, i, BLOCK: tl.constexpr, SIGNS: tl.constexpr):
    """acc (fp32) moved along the directions, by what `open_form` gave."""
    pairs, rest = directions
    mean = form[2]
    if len(mean) > 0:
        acc = tl.fma(mean[1], mean[0], acc)
    for k in tl.static_range(len(pairs)):
        acc = tl.fma(pairs[k][1], shaped(direction(first, i, pairs[k][0], tensor_id, BLOCK, SIGNS), form), acc)
    if len(rest) > 0:
        seeds, coefs, scales, count = rest
        for k in range(count):
            z = shaped(direction(first, i, tl.load(seeds + k), tensor_id, BLOCK, SIGNS), form)
            acc = tl.fma(load_step(coefs, scales, k), z, acc)
    return acc


@triton.jit
def shrink(x, decay):
    """decay * x, or x as fp32 where decay is empty."""
    acc = widen(x)
    for d in tl.static_range(len(decay)):
        acc = acc * decay[d]
    return acc


@triton.jit
def rounded(acc, rounding, tensor_id, first, i, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """acc in the dtype of theta: to nearest where there is no rounding seed."""
    if len(rounding) == 0:
        return nearest(acc, DTYPE)
    else:
        return stochastic(acc, rounding_bits(first, i, rounding[0], tensor_id, BLOCK), DTYPE)


@triton.jit
def advance(x, inside, change, first, i, BLOCK: tl.constexpr, SIGNS: tl.constexpr):
    """The new values of the tile at global index first + i, whose old values are x, in the dtype of x.

    change: (tensor id, directions of `load_directions`, decay, rounding seed, form of `load_form`); decay and rounding
    seed are tuples of one value, or empty: no decay, and rounding to nearest."""
    tensor_id, directions, decay, rounding, form = change
    opened = open_form(form, x, inside, i, BLOCK)
    acc = move(shrink(x, decay), opened, directions, tensor_id, first, i, BLOCK, SIGNS)
    return rounded(acc, rounding, tensor_id, first, i, BLOCK, x.dtype)
