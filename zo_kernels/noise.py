"""Noise contract, version 1: the executable specification, in plain torch integer arithmetic.

A direction is a function, not a stream:  z = N(seed, tensor id, element index).  Every device, chunk, shard and
thread makes its own piece of it; freezing or adding a tensor changes nobody else's noise.

    Philox4x32-10 (Salmon et al., SC'11; Random123 constants)
      key      k0, k1 = low, high half of the 64-bit seed
      counter  c0, c1 = low, high half of the group index;  c2 = tensor id;  c3 = stream
    normal      group = e >> 3; word j of the group gives elements 2j (cos) and 2j+1 (sin):
                u = fma(float(w), 2^-32, 2^-33),  r = sqrt(2 ln2 |log2 u|),  angle = 2 pi (w & 0xffff) / 65536
    rademacher  group = e >> 7; bit e & 31 of word (e >> 5) & 3; 1 is +1, 0 is -1
    rounding    group = e >> 3; 16 bits: low half of word (e & 7) >> 1 for even e, high half for odd e

Journals depend on every line here; a change is a new `NOISE_VERSION`.  Slow and obvious on purpose
(int64 tensors hold the 32-bit words): the C++ and Triton kernels are tested against these functions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

NOISE_VERSION = 1
DISTRIBUTIONS = ("normal", "rademacher")

# Streams: the fourth counter word keeps uses of one (seed, tensor, element) apart.
DIRECTION, ROUNDING, LOW_RANK, MASK, SEEDS = 0, 1, 2, 3, 0xFFFFFFFF
ROUNDING_PROBE = 0xFFFFFFFF  # the "probe number" whose seed rounds a step's update

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.")


def _multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low 32-bit halves of a * m for a (int64, < 2^32); 16-bit limbs keep every product below 2^49."""
    low, high = (a & 0xFFFF) * m, (a >> 16) * m
    total = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (total >> 32), total & _MASK32


def philox(seed: Tensor | int, counters: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Philox4x32-10.  seed: 0-dim int64 (bits of the unsigned seed) or int; counters: four int64 tensors of one
    shape, values below 2^32.  Returns int64 words, shape (..., 4), each below 2^32."""
    c0, c1, c2, c3 = counters
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return torch.stack([c0, c1, c2, c3], dim=-1)


def words(groups: Tensor, seed: Tensor | int, tensor_id: int, stream: int) -> Tensor:
    """Words of the given groups (int64, any shape): int64 (..., 4)."""
    same = torch.zeros_like(groups)
    return philox(seed, (groups & _MASK32, (groups >> 32) & _MASK32, same + tensor_id, same + stream))


def normal(elements: Tensor, seed: Tensor | int, tensor_id: int, stream: int = DIRECTION) -> Tensor:
    """Standard normals of the given element indices (int64): fp32, radius and angle evaluated in fp64.

    The largest value is sqrt(2 ln2 * 33) = 6.76, at u = 2^-33."""
    w = words(elements >> 3, seed, tensor_id, stream)
    w = w.gather(-1, ((elements & 7) >> 1).unsqueeze(-1)).squeeze(-1)
    u = (w.to(torch.float32).double() * 2.0**-32 + 2.0**-33).to(torch.float32).double()  # = fma in fp32
    radius = torch.sqrt(2 * math.log(2) * torch.log2(u).abs())
    angle = (w & 0xFFFF).double() * (2 * math.pi / 65536)
    return torch.where(elements & 1 == 0, radius * torch.cos(angle), radius * torch.sin(angle)).to(torch.float32)


def rademacher(elements: Tensor, seed: Tensor | int, tensor_id: int, stream: int = DIRECTION) -> Tensor:
    """Random signs of the given element indices (int64): fp32, +1 or -1."""
    w = words(elements >> 7, seed, tensor_id, stream)
    w = w.gather(-1, ((elements >> 5) & 3).unsqueeze(-1)).squeeze(-1)
    return (((w >> (elements & 31)) & 1) * 2 - 1).to(torch.float32)


def rounding_bits(elements: Tensor, seed: Tensor | int, tensor_id: int) -> Tensor:
    """16 random bits per element index: int64 below 2^16."""
    w = words(elements >> 3, seed, tensor_id, ROUNDING)
    w = w.gather(-1, ((elements & 7) >> 1).unsqueeze(-1)).squeeze(-1)
    return torch.where(elements & 1 == 0, w & 0xFFFF, w >> 16)


def derive_seed(run_seed: int, step: int, probe: int) -> int:
    """Unsigned 64-bit seed of probe `probe` of step `step`: words 0 (low) and 1 (high) of
    Philox(key = run seed; step low, step high, probe, 0xFFFFFFFF).  `ROUNDING_PROBE` gives the step's rounding seed.

    Runs on the host (Python integers), once per probe: a seed is never a generator state."""
    c0, c1, c2, c3 = step & _MASK32, (step >> 32) & _MASK32, probe & _MASK32, SEEDS
    k0, k1 = run_seed & _MASK32, (run_seed >> 32) & _MASK32
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0 | (c1 << 32)


def canonical_name(name: str) -> str:
    """The parameter's name without the prefixes that wrappers add (DDP, torch.compile, FSDP)."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def tensor_ids(names: Iterable[str]) -> dict[str, int]:
    """Name -> 32-bit tensor id: bytes 0..3 of BLAKE2s(name), little-endian.  On a collision the later name in
    sorted order takes bytes 4..7, and so on.  Keys are the names as given; ids are those of the canonical names."""
    ids: dict[str, int] = {}
    taken: set[int] = set()
    for canonical, name in sorted((canonical_name(n), n) for n in names):
        digest = hashlib.blake2s(canonical.encode("utf-8"), digest_size=32).digest()
        for start in range(0, 32, 4):
            tensor_id = int.from_bytes(digest[start : start + 4], "little")
            if tensor_id not in taken:
                break
        else:
            raise ValueError(f"no free 32-bit id for tensor {name!r}: all eight candidates are taken")
        taken.add(tensor_id)
        ids[name] = tensor_id
    return ids
