"""The noise contract (`zo_kernels.noise`) on the device.

    z = N(seed, tensor id, element):  Philox4x32-10, 8 normals or 128 signs or 8 rounding fields per call

Everything works on tiles: BLOCK consecutive elements whose first has a global index that is a multiple of 128 and
which do not straddle a multiple of 2^35 (there the low half of the group index would wrap inside a tile; callers cut
tiles at multiples of a power of two).  What makes it fast (`tl.randn` takes 120 instructions per element, this 12):
a 32 x 32 -> 64 bit product is one IMAD.WIDE where it is written as a u64 product; one word gives both elements of a
Box-Muller pair; log2, sqrt, sin and cos are one MUFU each.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Inline PTX does not exist in the interpreter, and its fp32 -> bf16 cast truncates.
HARDWARE = tl.constexpr(not triton.knobs.runtime.interpret)

DIRECTION = tl.constexpr(0)  # the streams of `zo_kernels.noise`
ROUNDING = tl.constexpr(1)


@triton.jit
def philox(c0, c1, c2, c3, seed):
    """Philox4x32-10: four counters (uint32, scalars or tensors that broadcast), seed int64; four uint32 words."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        low = c0.to(tl.uint64) * 0xD2511F53
        high = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (high >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (low >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = high.to(tl.uint32)
        c3 = low.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def words(group, i, seed, tensor_id, stream, GROUPS: tl.constexpr):
    """The words of GROUPS consecutive groups from `group` (int64) on, in order: uint32 (4 * GROUPS,)."""
    c0 = group.to(tl.uint32) + i + tl.arange(0, GROUPS).to(tl.uint32)
    c1 = (group >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox(c0, c1, tensor_id.to(tl.uint32), stream, seed)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (4 * GROUPS,))


@triton.jit
def _log2(x):
    if HARDWARE:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.log2(x)


@triton.jit
def _sqrt(x):
    if HARDWARE:
        return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.sqrt(x)


@triton.jit
def _cos(x):
    if HARDWARE:
        return tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.cos(x)


@triton.jit
def _sin(x):
    if HARDWARE:
        return tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.sin(x)


@triton.jit
def normal(first, i, seed, tensor_id, BLOCK: tl.constexpr):
    """Standard normals of elements first .. first + BLOCK: fp32 (BLOCK,)."""
    w = words(first >> 3, i.to(tl.uint32) >> 3, seed, tensor_id, DIRECTION, BLOCK // 8)
    u = tl.fma(w.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)  # 2^-32, 2^-33: u is never 0
    # |log2 u|: the hardware's log2 can exceed 0 near 1.
    radius = _sqrt(tl.abs(_log2(u)) * 1.3862943611198906)
    # 0x43000000 | k is 128 + k / 65536 exactly: one logic operation and one FMA give 2 pi k / 65536.
    turn = ((w & 0xFFFF) | 0x43000000).to(tl.float32, bitcast=True)
    angle = tl.fma(turn, 6.2831854820251465, -804.2477416992188)
    return tl.reshape(tl.join(radius * _cos(angle), radius * _sin(angle)), (BLOCK,))


@triton.jit
def rademacher(first, i, seed, tensor_id, BLOCK: tl.constexpr):
    """Random signs of elements first .. first + BLOCK: fp32 (BLOCK,), bit 1 is +1 and bit 0 is -1."""
    w = words(first >> 7, i.to(tl.uint32) >> 7, seed, tensor_id, DIRECTION, BLOCK // 128)
    shift = (31 - tl.arange(0, 32)).to(tl.uint32)
    bit = tl.reshape(w[:, None] << shift[None, :], (BLOCK,))  # now bit 31; 0xbf800000 is -1.0
    return ((bit & 0x80000000) ^ 0xBF800000).to(tl.float32, bitcast=True)


@triton.jit
def direction(first, i, seed, tensor_id, BLOCK: tl.constexpr, RADEMACHER: tl.constexpr):
    if RADEMACHER:
        return rademacher(first, i, seed, tensor_id, BLOCK)
    else:
        return normal(first, i, seed, tensor_id, BLOCK)


@triton.jit
def rounding_bits(first, i, seed, tensor_id, BLOCK: tl.constexpr):
    """16 random bits for each of the elements first .. first + BLOCK: uint32 (BLOCK,)."""
    w = words(first >> 3, i.to(tl.uint32) >> 3, seed, tensor_id, ROUNDING, BLOCK // 8)
    return tl.reshape(tl.join(w & 0xFFFF, w >> 16), (BLOCK,))


@triton.jit(do_not_specialize=["out", "groups", "seed", "tensor_id", "stream", "first_group"])
def words_kernel(out, groups: tl.int64, seed, tensor_id: tl.int64, stream: tl.int64, first_group: tl.int64,
                 GROUPS: tl.constexpr):  # fmt: skip
    """out: int32 (groups, 4).  One program per tile of GROUPS groups, tiles cut at multiples of GROUPS."""
    tile = (first_group // GROUPS + tl.program_id(0)) * GROUPS
    w = words(tile, tl.load(seed), tensor_id, stream.to(tl.uint32), GROUPS)
    place = (tile - first_group) * 4 + tl.arange(0, 4 * GROUPS)
    tl.store(out + place, w.to(tl.int32, bitcast=True), mask=(place >= 0) & (place < groups * 4))


@triton.jit(do_not_specialize=["out", "numel", "seed", "tensor_id", "start"])
def noise_kernel(out, numel: tl.int64, seed, tensor_id: tl.int64, start: tl.int64,
                 BLOCK: tl.constexpr, RADEMACHER: tl.constexpr):  # fmt: skip
    """out: fp32 (numel,), the direction's elements from `start` on.  One program per tile cut at multiples of BLOCK."""
    tile = (start // BLOCK + tl.program_id(0)) * BLOCK
    z = direction(tile, tl.load(seed), tensor_id, BLOCK, RADEMACHER)
    place = tile - start + tl.arange(0, BLOCK)
    tl.store(out + place, z, mask=(place >= 0) & (place < numel))
