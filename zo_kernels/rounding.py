"""Rounding fp32 to a storage dtype, a fused multiply-add and a root, in plain torch: part of the noise contract.

    stochastic  away from zero when  r + floor(2^16 frac) >= 2^16,  frac = place of |x| between its two neighbours,
                r = 16 random bits (`noise.rounding_bits`).  bf16: (bits + r) >> 16.  fp16: subnormals included.
    A non-finite x is converted, never rounded: 0x7fffffff plus bits would become -0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """fl32(a * b + c), rounded once.  The product of two fp32 is exact in fp64; the fp64 sum is rounded to odd
    (Boldo & Melquiond 2008) so that the second rounding, to fp32, cannot go wrong."""
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)  # two-sum: exact
    bits = total.view(torch.int64)
    inexact = (error != 0) & (bits & 1 == 0) & torch.isfinite(total)
    # One step in the magnitude's direction when the error points away from zero, one back when towards it.
    step = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(inexact, bits + step, bits).view(torch.float64).to(torch.float32)


def sqrt(x: Tensor) -> Tensor:
    """fl32(sqrt(x)) of fp32, rounded once.  torch's own fp32 root on the CPU is a vector library's: an ulp off in one
    value of 135.  No root of 24 bits lies so near to a border of roundings that fp64 would put it on the other side."""
    return torch.sqrt(x.double()).to(torch.float32)


def round_stochastic(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """x: fp32; bits: int64 below 2^16, same shape.  Returns `dtype` (fp32 is returned unchanged)."""
    if dtype == torch.float32:
        return x
    pattern = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    sign, magnitude = pattern >> 31, pattern & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        rounded = (magnitude + bits) >> 16
    else:
        rounded = _half_magnitude(magnitude, bits)
    rounded = (sign << 15) | rounded
    rounded = torch.where(rounded >= 0x8000, rounded - 0x10000, rounded).to(torch.int16).view(dtype)
    return torch.where(torch.isfinite(x), rounded, x.to(dtype))


def _half_magnitude(magnitude: Tensor, bits: Tensor) -> Tensor:
    """fp32 magnitude bits -> fp16 magnitude bits, stochastically rounded; 65536 and beyond become infinity."""
    exponent = (magnitude >> 23) - 127
    mantissa = (magnitude & 0x7FFFFF) | torch.where(magnitude >> 23 > 0, 0x800000, 0)
    # Bits dropped: 13 for a normal fp16, more below 2^-14; past 40 the value is below 2^-16 of the smallest step.
    dropped = (13 + (-14 - exponent).clamp(min=0)).clamp(max=41)
    floor = mantissa >> dropped
    frac = mantissa & ((1 << dropped) - 1)
    frac16 = torch.where(dropped >= 16, frac >> (dropped - 16).clamp(min=0), frac << (16 - dropped).clamp(min=0))
    up = (bits + frac16) >> 16
    # floor carries the implicit bit of a normal number, so the exponent field starts one lower.
    biased = (exponent + 14).clamp(min=0) << 10
    return (torch.where(exponent >= -14, biased + floor, floor) + up).clamp(max=0x7C00)


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of `dtype` at |x| (fp32 in, fp32 out); subnormal spacing below the smallest normal."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x.abs().float().clamp(min=info.tiny))
    return torch.ldexp(torch.full_like(x, info.eps, dtype=torch.float32), exponent - 1)
