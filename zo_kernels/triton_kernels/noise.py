"""The noise contract (`zo_kernels.noise`) on the device.

    z = N(seed, tensor id, element):  Philox4x32-10, 8 normals or 128 signs or 8 rounding fields per call

Everything works on tiles: the BLOCK elements from global index first + i on, where `first` (int64) and i are
multiples of 128 and no multiple of 2^35 lies inside first .. first + i + BLOCK (the low half of the group
index would wrap there: callers cut their spans at multiples of a power of two).  The two are kept apart so
that all that depends on `first` alone leaves the loop over i.

What makes it fast (a `tl.randn` kernel takes 120 instructions per element, this one 16): eight normals per
Philox call, two from each word; the 32 x 32 -> 64 bit product written as a u64 product, which is one
IMAD.WIDE; log2, sqrt, sin and cos as one MUFU each.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter has no inline PTX, and its cast from fp32 to bf16 truncates.
HARDWARE = tl.constexpr(not triton.knobs.runtime.interpret)

DIRECTION = tl.constexpr(0)  # the streams of `zo_kernels.noise`
ROUNDING = tl.constexpr(1)


@triton.jit
def philox(c0, c1, c2, c3, seed):
    """Philox4x32-10.  c0 .. c3: uint32 scalars or tensors, seed: int64 scalar.  Returns four uint32 words."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def words(group, i, seed, tensor_id, stream, GROUPS: tl.constexpr):
    """The words of GROUPS groups from group + i on (group int64, i int32), in order: uint32 (4 * GROUPS,)."""
    c0 = group.to(tl.uint32) + i + tl.arange(0, GROUPS).to(tl.uint32)
    c1 = (group >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox(c0, c1, tensor_id.to(tl.uint32), stream, seed)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (4 * GROUPS,))


@triton.jit
def _abs_log2(x):
    """The absolute value matters: the hardware's log2 can exceed 0 near 1.  In here it costs no instruction; Triton
    3.6 spends one on `tl.abs`."""
    if HARDWARE:
        asm: tl.constexpr = "lg2.approx.ftz.f32 $0, $1; abs.f32 $0, $0;"
        return tl.inline_asm_elementwise(asm, "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.abs(tl.log2(x))


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
def _angle(w):
    """2 pi (w & 0xffff) / 65536, rounded once."""
    turns = ((w & 0xFFFF) | 0x43000000).to(tl.float32, bitcast=True)  # 128 + k / 65536, exactly
    if HARDWARE:
        return tl.fma(turns, 6.2831854820251465, -804.2477416992188)  # - 128 * fl(2 pi), exact as well
    else:
        return (turns - 128.0) * 6.2831854820251465  # the same value; Triton 3.6 interprets fma as two roundings


@triton.jit
def normal(first, i, seed, tensor_id, stream, BLOCK: tl.constexpr):
    """Standard normals of a tile: fp32 (BLOCK,).  No argument is subnormal, so `.ftz` flushes nothing."""
    w = words(first >> 3, i // 8, seed, tensor_id, stream, BLOCK // 8)
    u = tl.fma(w.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)  # 2^-32, 2^-33: never 0
    radius = _sqrt(_abs_log2(u) * 1.3862943611198906)
    angle = _angle(w)
    return tl.reshape(tl.join(radius * _cos(angle), radius * _sin(angle)), (BLOCK,))


@triton.jit
def rademacher(first, i, seed, tensor_id, stream, BLOCK: tl.constexpr):
    """Random signs of a tile: fp32 (BLOCK,), +1 where the bit is 1 and -1 where it is 0."""
    w = words(first >> 7, i // 128, seed, tensor_id, stream, BLOCK // 128)
    lift = (31 - tl.arange(0, 32)).to(tl.uint32)
    lifted = tl.reshape(w[:, None] << lift[None, :], (BLOCK,))  # each element's bit is now bit 31
    return ((lifted & 0x80000000) ^ 0xBF800000).to(tl.float32, bitcast=True)  # 0xbf800000 is -1


@triton.jit
def draw(first, i, seed, tensor_id, stream, BLOCK: tl.constexpr, SIGNS: tl.constexpr):
    """Noise of any stream (uint32) for a tile: fp32 (BLOCK,)."""
    if SIGNS:
        return rademacher(first, i, seed, tensor_id, stream, BLOCK)
    else:
        return normal(first, i, seed, tensor_id, stream, BLOCK)


@triton.jit
def direction(first, i, seed, tensor_id, BLOCK: tl.constexpr, SIGNS: tl.constexpr):
    """z of a tile: fp32 (BLOCK,)."""
    return draw(first, i, seed, tensor_id, DIRECTION, BLOCK, SIGNS)


@triton.jit
def rounding_bits(first, i, seed, tensor_id, BLOCK: tl.constexpr):
    """16 random bits for each element of a tile: uint32 (BLOCK,)."""
    w = words(first >> 3, i // 8, seed, tensor_id, ROUNDING, BLOCK // 8)
    return tl.reshape(tl.join(w & 0xFFFF, w >> 16), (BLOCK,))


@triton.jit(do_not_specialize=["out", "groups", "seed", "tensor_id", "stream", "first_group"])
def words_kernel(
    out,  # int32 (groups, 4): the words' bit patterns
    groups: tl.int64,
    seed,  # int64 ()
    tensor_id: tl.int64,
    stream: tl.int64,
    first_group: tl.int64,
    GROUPS: tl.constexpr,
):
    """One program per tile of GROUPS groups; tiles are cut at multiples of GROUPS."""
    tile = (first_group & -GROUPS) + tl.program_id(0).to(tl.int64) * GROUPS
    w = words(tile, 0, tl.load(seed), tensor_id, stream.to(tl.uint32), GROUPS)
    place = (tile - first_group) * 4 + tl.arange(0, 4 * GROUPS)
    tl.store(out + place, w.to(tl.int32, bitcast=True), mask=(place >= 0) & (place < groups * 4))


@triton.jit(do_not_specialize=["out", "numel", "seed", "tensor_id", "start", "stream"])
def noise_kernel(
    out,  # fp32 (numel,)
    numel: tl.int64,
    seed,  # int64 ()
    tensor_id: tl.int64,
    start: tl.int64,  # global index of out[0]
    stream: tl.int64,
    BLOCK: tl.constexpr,
    SIGNS: tl.constexpr,
):
    """One program per tile of BLOCK elements; tiles are cut at multiples of BLOCK."""
    tile = (start & -BLOCK) + tl.program_id(0).to(tl.int64) * BLOCK
    z = draw(tile, 0, tl.load(seed), tensor_id, stream.to(tl.uint32), BLOCK, SIGNS)
    place = tile - start + tl.arange(0, BLOCK)
    tl.store(out + place, z, mask=(place >= 0) & (place < numel))
