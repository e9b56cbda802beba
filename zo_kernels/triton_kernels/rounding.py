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
def _fma_down(a, b, c):
    """a * b + |c| rounded toward zero, for a * b exact and not negative: fp32."""
    if HARDWARE:
        asm: tl.constexpr = "{ .reg .f32 c; abs.f32 c, $3; fma.rz.f32 $0, $1, $2, c; }"
        return tl.inline_asm_elementwise(asm, "=f,f,f,f", [a, b, c], tl.float32, True, 1)
    else:
        exact = (a * b).to(tl.float64) + tl.abs(c).to(tl.float64)
        rounded = exact.to(tl.float32)
        below = (rounded.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
        return tl.where(rounded.to(tl.float64) > exact, below, rounded)


@triton.jit
def stochastic(x, r, DTYPE: tl.constexpr):
    """x (fp32, the result of an fma) rounded to bf16 or fp16 by r (uint32 below 2^16)."""
    bits = x.to(tl.int32, bitcast=True)
    if DTYPE == tl.bfloat16:
        # r cannot carry out of infinity's empty lower half, but it would carry the device's NaN (0x7fffffff
        # after an fma) to -0: one min clears that lower half too (a test and a select are two instructions).
        capped = tl.minimum(bits, 0x7FFF0000)
        return ((capped.to(tl.uint32, bitcast=True) + r) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        # The power of two at or below |x|, kept to fp16's normal numbers: a step of fp16 is 2^-10 of it.
        power = tl.minimum(tl.maximum(bits & 0x7F800000, 0x38800000), 0x47000000).to(tl.float32, bitcast=True)
        share = (r | 0x3E000000).to(tl.float32, bitcast=True) - 0.125  # 2^-26 r: r / 2^16 of a step
        # |x| + r / 2^16 steps, cut to fp32, then to whole steps: beside 8192 powers fp32 has no bit below a step.
        raised = _fma_down(share, power, x)
        steps = tl.fma(power, -8192.0, _fma_down(power, 8192.0, raised))
        signed = steps.to(tl.int32, bitcast=True) | (bits & -0x80000000)
        return signed.to(tl.float32, bitcast=True).to(DTYPE)  # exact; 65536 and beyond are infinity
