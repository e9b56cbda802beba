"""Statistics and noise dots of the Triton backend against the reference, within budgets derived from their sums."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
import triton_target
from triton_target import DTYPES, SEEDS, UNIT, blocks_of, misfits, mixed, put, scratches, stats_of, updated

from zo_kernels import noise as contract
from zo_kernels.backends import reference
from zo_kernels.blocks import Blocks
from zo_kernels.ops import seed_tensor
from zo_kernels.triton_kernels.table import chunk_starts

interpreted, target = triton_target.interpreted, triton_target.target  # fixtures

HEAD = 128  # elements whose mean is a chunk's shift


@pytest.fixture(autouse=True)
def _several_chunks_per_tensor_and_tiles_per_chunk(target, monkeypatch):
    for name, value in {"BLOCK": 512, "UPDATE_BLOCK": 512, "CHUNK": 2048, "SPAN": 2048}.items():
        monkeypatch.setattr(target.backend.launch, name, value)


def additions(backend, dtype) -> int:
    """fp32 additions that an element goes through: over the 16 bytes of a thread, then over a chunk's tiles."""
    return 16 // dtype.itemsize + backend.launch.CHUNK // backend.launch.BLOCK


def budgets(backend, x, before, offset):
    """Bounds on the errors of (mean, var, norm) of x (fp64, flat), whose values were `before` when the pass began.

    With A additions, |error of sum d| <= (A + 1) u sum |d| and |error of sum d^2| <= (A + 4) u sum d^2: d is rounded,
    and squared.  M2 = sum d^2 - (sum d)^2 / n, and a chunk's mean enters the spread of the means."""
    a, n, mean = additions(backend, before.dtype), x.numel(), x.mean()
    starts = chunk_starts(n, offset, backend.launch.CHUNK).clamp(min=0).tolist()
    sums = squares = 0.0
    for start, stop in zip(starts, [*starts[1:], n], strict=True):
        d = x[start:stop] - before[start : min(stop, start + HEAD)].double().mean().float()
        plain = (a + 1) * UNIT * d.abs().sum().item()
        away = (d.mean().abs() + (x[start:stop].mean() - mean).abs()).item()
        sums += plain
        squares += (a + 4) * UNIT * (d * d).sum().item() + 2 * plain * away
    norm = max(x.norm().item(), 1e-300)
    mean_error, m2_error = sums / n, squares * (1 + 1e-3)  # products of two errors
    return mean_error, m2_error / max(n - 1, 1), (m2_error + 2 * n * abs(mean.item()) * mean_error) / (2 * norm)


def assert_stats(backend, stats, tensors, before=None, offsets=None):
    """Against the reference's statistics of `tensors`; `before`: what they were when the pass began."""
    before = tensors if before is None else before
    expected = stats_of(len(tensors))
    reference.block_stats(blocks_of(tensors), expected)
    assert torch.equal(stats.nonfinite.cpu(), expected.nonfinite)
    for b, (tensor, old) in enumerate(zip(tensors, before, strict=True)):
        ours, theirs = ([values[b].item() for values in s[:3]] for s in (stats, expected))
        if tensor.numel() == 0 or expected.nonfinite[b]:
            numpy.testing.assert_equal(ours, theirs)
            continue
        flat = tensor.double().reshape(-1)
        allowed = budgets(backend, flat, old.reshape(-1), offsets[b] if offsets else 0)
        for actual, value, error in zip(ours, theirs, allowed, strict=True):
            assert abs(actual - value) <= error + 2 * UNIT * abs(value), (b, actual, value, error)


def looked_at(target, tensors, offsets=None):
    stats = stats_of(len(tensors), target.device)
    target.backend.block_stats(blocks_of([t.to(target.device) for t in tensors], offsets), stats)
    return stats


def test_block_stats_equal_the_reference(target):
    """All dtypes, a far mean, one element, none."""
    near_one = [1 + 1e-4 * torch.randn(5000, generator=torch.Generator().manual_seed(7))]
    tensors = [*mixed(), *near_one, torch.empty(0, 4), -mixed()[2] - 100, torch.zeros(70)]
    stats = looked_at(target, tensors)
    assert_stats(target.backend, stats, tensors)
    again = looked_at(target, tensors)
    for one, two in zip(stats, again, strict=True):
        assert numpy.array_equal(one.cpu(), two.cpu(), equal_nan=True)


def test_misfits_have_the_same_statistics(target):
    tensors, offsets = misfits(target.device)
    stats = stats_of(len(tensors), target.device)
    target.backend.block_stats(blocks_of(tensors, offsets), stats)
    assert_stats(target.backend, stats, [t.cpu().contiguous() for t in tensors], offsets=offsets)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constants_have_no_variance(target, dtype):
    values = [0.1, 1.0, -3e-5, 60000.0]
    tensors = [torch.full((size,), value, dtype=dtype) for value in values for size in (1, 77, 4500)]
    stats = looked_at(target, tensors)
    assert not stats.var.any()
    assert torch.equal(stats.mean.cpu(), torch.stack([t[0].float() for t in tensors]))


def test_nonfinite_elements_are_counted(target):
    """In their block alone, wherever they stand: the first element, a later chunk, a tail."""
    tensors = [t for t in mixed() if t.numel() > 1000]
    tensors[0][0], tensors[1][3000], tensors[1][4098], tensors[2][5] = math.nan, math.inf, -math.inf, math.nan
    tensors[4][:] = -math.inf
    with numpy.errstate(all="ignore"):  # the interpreter's inf - inf
        stats = looked_at(target, tensors)
    assert stats.nonfinite.tolist() == [1, 2, 1, 0, 1003, 0]
    assert_stats(target.backend, stats, tensors)


def test_finite_values_whose_squares_overflow(target):
    tensors = [mixed()[2] * 1e30, mixed()[5] * 1e30, torch.cat([torch.ones(3000), torch.tensor([-3e38])])]
    with numpy.errstate(all="ignore"):
        stats = looked_at(target, tensors)
    assert not stats.nonfinite.any() and stats.var.isinf().any()  # 1e76 is no fp32: as in the reference
    scale = torch.tensor([t.double().norm() for t in tensors])
    assert ((stats.norm.cpu().double() / scale - 1).abs() <= 2 * UNIT).all()


@pytest.mark.parametrize("rounding", [None, 5])
def test_statistics_that_ride_describe_what_is_stored(target, rounding):
    tensors, offsets = misfits()
    before, offsets = [*mixed(), *[t.contiguous() for t in tensors[:4]]], [0] * 9 + offsets[:4]
    placed = [*mixed(target.device), *misfits(target.device)[0][:4]]
    stats = stats_of(len(placed), target.device)
    after = updated(target.backend, placed, [1e-2], "normal", rounding=rounding, offsets=offsets, stats=stats)
    assert_stats(target.backend, stats, [t.contiguous() for t in after], before, offsets)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "misaligned"])
def test_statistics_that_ride_on_a_scratch(target, dtype, shift):
    """Of theta, which is read; of the new theta, where it is updated first."""
    storage = torch.randn(4600, generator=torch.Generator().manual_seed(8)).to(dtype).to(target.device)
    theta = storage[shift : shift + 4500]
    stats = stats_of(1, target.device)
    scratches(target.backend, theta, 1e-3, "rademacher", nearest_above=1.0, mirror=True, stats=stats)
    assert_stats(target.backend, stats, [theta.cpu()])

    before, one, out = theta.cpu().clone(), put(1.0, target.device), torch.empty_like(theta)
    seed, stats = seed_tensor(3, target.device), stats_of(1, target.device)
    update = (seed.reshape(1), put([1e-2], target.device), None, None, seed)
    target.backend.update_scratch_(theta, out, None, 7, *update, seed, one, None, None, "normal", stats)
    assert_stats(target.backend, stats, [theta.cpu()], [before])
    assert not torch.equal(theta.cpu(), before)
    empty, nothing = stats_of(1, target.device), torch.empty(0, dtype=dtype, device=target.device)
    scratches(target.backend, nothing, 1e-3, "normal", stats=empty)
    assert_stats(target.backend, empty, [nothing.cpu()])


def dots(module, tensors, offsets, seeds, dist, stats=None):
    device = tensors[0].device
    out = torch.full((len(seeds), len(tensors)), 77.0, device=device)
    module.dot_noise(blocks_of(tensors, offsets), seed_tensor(seeds, device), out, dist, stats)
    return out.cpu()


@pytest.mark.parametrize("dist", ["rademacher", "normal"])
def test_dots_equal_the_reference(target, dist):
    """|error| <= A u sum |x z| for A additions, and sum |x| times the error of z."""
    some, some_offsets = misfits(target.device)
    tensors = [*mixed(target.device)[2::3], torch.empty(0, device=target.device), *some[1:4]]
    offsets = [0] * 4 + some_offsets[1:4]
    plain = [t.cpu().contiguous() for t in tensors]
    blocks = blocks_of(plain, offsets)
    seeds = SEEDS[1:]
    actual = dots(target.backend, tensors, offsets, seeds, dist)
    expected = dots(reference, plain, offsets, seeds, dist)
    for k, seed in enumerate(seeds):
        for b, x in enumerate(plain):
            flat = x.double().flatten().abs()
            elements = torch.arange(x.numel()) + offsets[b]
            z = reference.directions(elements, seed_tensor(seed), blocks.ids[b], dist).double()
            error = additions(target.backend, x.dtype) * UNIT * (flat @ z.abs())
            if dist == "normal":
                pairs = torch.stack([elements & -2, elements | 1])
                radius = contract.normal(pairs, seed_tensor(seed), blocks.ids[b]).double().norm(dim=0)
                error = error + flat @ target.budget(radius)
            assert (actual[k, b] - expected[k, b]).abs() <= error + 2 * UNIT * expected[k, b].abs(), (k, b)
    stats = stats_of(len(tensors), target.device)
    assert torch.equal(dots(target.backend, tensors, offsets, seeds, dist, stats), actual)
    assert_stats(target.backend, stats, plain, offsets=offsets)


def test_a_list_of_nothing(target):
    device = target.device
    dots(target.backend, [torch.empty(0, device=device)], None, SEEDS, "normal")
    for blocks in (Blocks([]), Blocks([("empty", torch.empty(0, 4, device=device))])):
        stats, out = stats_of(len(blocks), device), torch.full((1, len(blocks)), 77.0, device=device)
        target.backend.dot_noise(blocks, seed_tensor([1], device), out, "normal", stats)
        assert not out.any()
        assert stats.mean.isnan().all() and not any(values.any() for values in stats[1:])
