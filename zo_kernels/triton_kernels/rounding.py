"""fp32 to bf16 and fp16 and back on the device, bit-equal to `zo_kernels.rounding`.

Stochastic rounding is away from zero when r + floor(2^16 frac) >= 2^16: frac is the place of |x| between its
two neighbours, r are 16 random bits.  A non-finite x is converted, never rounded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zo_kernels.triton_kernels.noise import HARDWARE


@triton.jit
def widen(x):
    """x as fp32, exactly: the interpreter would read a subnormal bf16 as 0."""
    if x.dtype == tl.bfloat16 and not HARDWARE:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def nearest(x, DTYPE: tl.constexpr):
    """x (fp32) rounded to nearest even."""
    if DTYPE == tl.bfloat16 and not HARDWARE:
        bits = x.to(tl.uint32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        even = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, even)
        return even.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def stochastic(x, r, DTYPE: tl.constexpr):
    """x (fp32, the result of an fma) rounded to bf16 or fp16 by r (uint32 below 2^16)."""
    if DTYPE == tl.bfloat16:
        # r cannot carry out of infinity's empty lower half, but it would carry the device's NaN (0x7fffffff
        # after an fma) to -0: one min clears that lower half too (a test and a select are two instructions).
        capped = tl.minimum(x.to(tl.int32, bitcast=True), 0x7FFF0000)
        rounded = (capped.to(tl.uint32, bitcast=True) + r) >> 16
    else:
        bits = x.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # Normal in fp16: 13 bits d are dropped, and d + floor(r / 8) >= 2^13 is 8 d + r >= 2^16.
        normal = ((magnitude + (r >> 3)) >> 13) - (112 << 10)
        # Below 2^-14 (0x38800000) the spacing is 2^-24, and floor(2^40 |x|) < 2^26 has 16 bits below it.
        small = tl.where(magnitude < 0x38800000, tl.abs(x), 0.0)
        subnormal = ((small * 1099511627776.0).to(tl.uint32) + r) >> 16
        rounded = tl.where(magnitude < 0x38800000, subnormal, normal)
        rounded = tl.where(magnitude < 0x47800000, rounded, 0x7C00)  # 65536 and beyond
        rounded = tl.where(magnitude > 0x7F800000, 0x7E00, rounded) | ((bits >> 16) & 0x8000)
    return rounded.to(tl.uint16).to(DTYPE, bitcast=True)
