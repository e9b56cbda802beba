"""The noise contract: published vectors, frozen values, equal bits from every backend, statistics."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from scipy import stats

import zo_kernels as zk
from zo_kernels import noise as contract

STARTS = (0, 3, 7, 2**32 - 5, 2**33 + 11, 2**40 + 1)
SIZES = (1, 5, 1000, 4099)
SEEDS = (0, 1, 2**63 + 5, 2**64 - 1)
TENSOR_ID = 0xDEADBEEF


def reference(op, *args, **kwargs):
    with zk.use_backend("reference"):
        return op(*args, **kwargs)


def signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


# Random123, kat_vectors, "philox4x32 10": counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(backend, counter, key, expected):
    seed = zk.seed_tensor(key[0] | key[1] << 32)
    group = signed(counter[0] | counter[1] << 32)
    words = zk.words(1, seed, counter[2], counter[3], first_group=group)
    assert [w & 0xFFFFFFFF for w in words[0].tolist()] == list(expected)


@pytest.mark.parametrize("run_seed", SEEDS)
@pytest.mark.parametrize("step", (0, 1, 2**32 + 7))
@pytest.mark.parametrize("probe", (0, 1, zk.ROUNDING_PROBE))
def test_a_derived_seed_is_two_words_of_philox(run_seed, step, probe):
    counter = (step & 0xFFFFFFFF, step >> 32, probe, 0xFFFFFFFF)
    words = contract.philox(run_seed, tuple(torch.tensor(c) for c in counter)).tolist()
    assert zk.derive_seed(run_seed, step, probe) == words[0] | words[1] << 32


def test_frozen_values():
    """Journals written today must replay for ever: a change here is a new NOISE_VERSION."""
    assert zk.NOISE_VERSION == 1
    assert zk.derive_seed(42, 7, 1) == 0x1EDCC5C8406D5EF7
    assert zk.tensor_ids(["model.embed_tokens.weight"]) == {"model.embed_tokens.weight": 0x58E70DFD}
    seed = zk.seed_tensor(2**63 + 5)
    signs = reference(zk.draw_noise, 12, seed, 7, start=2**33 + 120, dist="rademacher")
    assert "".join("+" if s > 0 else "-" for s in signs.tolist()) == "+++--++----+"
    z = reference(zk.draw_noise, 4, seed, 7, start=2**33 + 3)
    assert z.tolist() == pytest.approx([0.24714324, 0.11100940, -0.57654834, -0.15616116], abs=1e-7)


def test_tensor_ids_are_bytes_of_blake2s():
    name = "model.layers.0.self_attn.q_proj.weight"
    digest = hashlib.blake2s(name.encode()).digest()
    assert zk.tensor_ids([name]) == {name: int.from_bytes(digest[:4], "little")}


def test_wrappers_do_not_change_an_id():
    plain = zk.tensor_ids(["layers.0.weight"])["layers.0.weight"]
    for wrapped in (
        "module.layers.0.weight",
        "_orig_mod.layers.0.weight",
        "module._orig_mod.layers.0.weight",
        "_orig_mod.module.layers.0.weight",
        "layers.0._orig_mod.weight",
        "_fsdp_wrapped_module.layers.0._fsdp_wrapped_module.weight",
    ):
        assert zk.tensor_ids([wrapped]) == {wrapped: plain}


def test_an_id_does_not_depend_on_the_other_tensors():
    names = [f"layers.{i}.weight" for i in range(50)]
    every = zk.tensor_ids(names)
    assert zk.tensor_ids(names[10:20]) == {name: every[name] for name in names[10:20]}
    assert zk.tensor_ids(reversed(names)) == every


def test_the_later_of_two_colliding_names_takes_the_next_bytes():
    first, later = "layers.483.weight", "layers.89289.weight"  # found by search: bytes 0..3 are equal
    digests = {name: hashlib.blake2s(name.encode()).digest() for name in (first, later)}
    assert digests[first][:4] == digests[later][:4]
    for names in ([first, later], [later, first]):
        ids = zk.tensor_ids(names)
        assert ids[first] == int.from_bytes(digests[first][:4], "little")
        assert ids[later] == int.from_bytes(digests[later][4:8], "little")


def test_names_beyond_the_eighth_collision_are_refused(monkeypatch):
    class Same:
        @staticmethod
        def digest():
            return bytes(range(32))

    monkeypatch.setattr(hashlib, "blake2s", lambda *args, **kwargs: Same)
    ids = zk.tensor_ids("abcdefgh")
    assert list(ids.values()) == [int.from_bytes(bytes(range(4 * i, 4 * i + 4)), "little") for i in range(8)]
    with pytest.raises(ValueError, match="no free 32-bit id for tensor 'i'"):
        zk.tensor_ids("abcdefghi")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("start", STARTS)
def test_cpu_words_and_signs_are_the_reference_bits(cpu, start, seed):
    key = zk.seed_tensor(seed)
    for size in SIZES:
        for stream in (contract.DIRECTION, contract.ROUNDING):
            call = dict(groups=size, seed=key, tensor_id=TENSOR_ID, stream=stream, first_group=start)
            assert torch.equal(zk.words(**call), reference(zk.words, **call))
        call = dict(shape=size, seed=key, tensor_id=TENSOR_ID, start=start, dist="rademacher")
        assert torch.equal(zk.draw_noise(**call), reference(zk.draw_noise, **call))


def float64_normals(start: int, size: int, key: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The contract in float64 from the words alone: (normals, radii)."""
    first = start >> 3
    groups = (start + size - 1 >> 3) - first + 1
    w = (
        zk.words(groups, key, TENSOR_ID, contract.DIRECTION, first_group=first)
        .numpy()
        .view(np.uint32)
        .reshape(-1)
    )
    u = (w.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33).astype(np.float32).astype(np.float64)
    radius = np.sqrt(np.abs(2 * np.log(u)))
    turn = 2 * np.pi * (w & 0xFFFF) / 65536
    z = np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=-1).reshape(-1)
    place = start - 8 * first
    return z[place : place + size], np.repeat(radius, 2)[place : place + size]


@pytest.mark.parametrize("start", STARTS)
def test_normals_are_those_of_float64(backend, start):
    for seed in SEEDS:
        for size in SIZES:
            key = zk.seed_tensor(seed)
            z, radius = float64_normals(start, size, key)
            ours = zk.draw_noise(size, key, TENSOR_ID, start=start).numpy()
            assert (np.abs(ours - z) <= 1e-6 + 2e-6 * radius).all()


def test_cpu_normals_err_by_less_than_8e_7(cpu):
    z, _ = float64_normals(5, 4_000_003, zk.seed_tensor(3))
    ours = zk.draw_noise(4_000_003, zk.seed_tensor(3), TENSOR_ID, start=5).numpy()
    assert np.abs(ours - z).max() < 8e-7


def test_the_extreme_words(backend):
    """Found by search for seed 0, tensor id 1: a word 0 (u = 2^-33) and a word 0xffffffff (u rounds to 1)."""
    smallest, largest = 9393101970, 3123567406
    seed = zk.seed_tensor(0)
    words = [zk.words(1, seed, 1, 0, first_group=e >> 3)[0, (e & 7) >> 1].item() for e in (smallest, largest)]
    assert words == [0, -1]
    z = zk.draw_noise(2, seed, 1, start=smallest)
    assert z.tolist() == pytest.approx([math.sqrt(2 * math.log(2) * 33), 0.0], abs=1e-6)
    assert zk.draw_noise(2, seed, 1, start=largest).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dist", contract.DISTRIBUTIONS)
def test_pieces_are_slices_of_the_whole(backend, dist):
    seed, start = zk.seed_tensor(9), 2**32 - 1001
    whole = zk.draw_noise(4099, seed, TENSOR_ID, start=start, dist=dist)
    cuts = [0, 1, 2, 9, 127, 128, 129, 640, 1001, 3333, 4099]
    pieces = [
        zk.draw_noise(b - a, seed, TENSOR_ID, start=start + a, dist=dist)
        for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(zk.draw_noise((4099,), seed, TENSOR_ID, start=start, dist=dist), whole)


# Statistics: fixed seeds, 4 M samples, bands of 5 standard errors.
COUNT = 1 << 22
BAND = 5 / math.sqrt(COUNT)


def draw(seed: int = 1, tensor_id: int = 1, dist: str = "normal", start: int = 0) -> np.ndarray:
    return (
        zk.draw_noise(COUNT, zk.seed_tensor(seed), tensor_id, start=start, dist=dist)
        .numpy()
        .astype(np.float64)
    )


def test_moments_and_tails_are_those_of_a_normal(cpu):
    z = draw()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - mean) < BAND * math.sqrt(variance), power
    for limit in (3, 4, 4.5):
        for tail in (z > limit, z < -limit):
            p = stats.norm.sf(limit)
            assert abs(tail.sum() - COUNT * p) < 5 * math.sqrt(COUNT * p), limit
    assert np.abs(z).max() < 6.77
    assert stats.kstest(z[: 1 << 20], "norm").pvalue > 1e-3


def test_directions_are_uncorrelated(cpu):
    """Across tensors, seeds, steps and far elements; values and squares (Box-Muller pairs share a radius)."""
    z = draw()
    others = {
        "tensor id": draw(tensor_id=2),
        "seed, low bit": draw(seed=0),
        "seed, high half": draw(seed=1 + (1 << 32)),
        "seed, top bit": draw(seed=1 + (1 << 63)),
        "step": draw(seed=zk.derive_seed(1, 1, 0)),
        "probe": draw(seed=zk.derive_seed(1, 0, 1)),
        "next tensor id, same place": draw(tensor_id=1 << 31),
        "group index, high half": draw(start=1 << 35),
        **{f"neighbour {lag}": np.roll(z, lag) for lag in (1, 2, 7, 8, 9, 64, 128, 1024, 65536)},
    }
    for name, other in others.items():
        assert abs((z * other).mean()) < BAND, name
        assert abs(((z**2 - 1) * (other**2 - 1)).mean()) < 2 * BAND, name


def test_signs_are_fair_and_uncorrelated(cpu):
    s = draw(dist="rademacher")
    assert set(np.unique(s)) == {-1.0, 1.0}
    assert abs(s.mean()) < BAND
    for lag in (1, 2, 31, 32, 33, 64, 128, 4096):
        assert abs((s * np.roll(s, lag)).mean()) < BAND, lag
    for other in (draw(seed=2, dist="rademacher"), draw(tensor_id=2, dist="rademacher"), np.sign(draw())):
        assert abs((s * other).mean()) < BAND


@pytest.mark.parametrize("stream", (contract.DIRECTION, contract.ROUNDING))
def test_every_bit_and_byte_of_the_words_is_uniform(cpu, stream):
    words = zk.words(COUNT // 4, zk.seed_tensor(1), 1, stream).numpy().view(np.uint32)
    for j in range(4):
        for shift in range(32):
            assert abs((words[:, j] >> shift & 1).mean() - 0.5) < BAND, (j, shift)
        for shift in range(0, 32, 8):
            counts = np.bincount(words[:, j] >> shift & 0xFF, minlength=256)
            assert stats.chisquare(counts).pvalue > 1e-4, (j, shift)


@pytest.mark.parametrize("dist", contract.DISTRIBUTIONS)
def test_a_stream_has_noise_of_its_own(backend, dist):
    seed, start = zk.seed_tensor(2**63 + 5), 2**40 + 3
    draw = {s: zk.draw_noise(4000, seed, TENSOR_ID, start=start, dist=dist, stream=s) for s in (0, zk.LOW_RANK)}
    elements = torch.arange(4000) + start
    expected = getattr(contract, dist)(elements, seed, TENSOR_ID, zk.LOW_RANK)
    assert torch.allclose(draw[zk.LOW_RANK], expected, rtol=0, atol=1e-5)
    assert torch.equal(draw[0], zk.draw_noise(4000, seed, TENSOR_ID, start=start, dist=dist))
    assert abs(draw[0] @ draw[zk.LOW_RANK]) < 5 * 4000**0.5


def test_the_streams_are_independent(cpu):
    """Rounding bits must not know the direction that they round."""
    seed = zk.seed_tensor(1)
    a, b = (zk.words(COUNT // 4, seed, 1, stream).numpy().view(np.uint32).reshape(-1) for stream in (0, 1))
    for shift in (0, 15, 16, 31):
        x, y = (2.0 * (w >> shift & 1) - 1 for w in (a, b))
        assert abs((x * y).mean()) < BAND, shift
    joint = np.bincount((a & 0xF) * 16 + (b & 0xF), minlength=256)
    assert stats.chisquare(joint).pvalue > 1e-4


@pytest.mark.parametrize("bad", (-1, 2**64))
def test_a_seed_is_an_unsigned_64_bit_integer(bad):
    with pytest.raises(ValueError, match="not an unsigned 64-bit integer"):
        zk.seed_tensor(bad)
