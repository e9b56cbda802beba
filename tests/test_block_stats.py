"""Block statistics, alone and riding on another pass, against fp64 on every CPU backend."""

from __future__ import annotations

import math

import pytest
import torch
from test_ops import COEFS, DTYPES, ROUNDING_SEED, SEEDS, clones, mixed, weights

import zo_kernels as zk


def assert_same(ours: zk.BlockStats, theirs: zk.BlockStats) -> None:
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        assert torch.equal(a, b) or torch.equal(a[~a.isnan()], b[~b.isnan()]), name
        assert torch.equal(a.isnan(), b.isnan()), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_block_stats_are_those_of_fp64(backend, dtype):
    named = [
        ("weight", weights((300, 401), dtype)),
        ("norm", (1 + 1e-4 * torch.randn(70_001)).to(dtype)),  # E[x^2] - E[x]^2 in fp32 would give noise
        ("one", weights((1,), dtype)),
        ("two", torch.tensor([3.0, 5.0], dtype=dtype)),
    ]
    stats = zk.block_stats(zk.Blocks(named))
    for i, (name, tensor) in enumerate(named):
        x = tensor.double()
        assert stats.mean[i].item() == pytest.approx(x.mean().item(), rel=1e-7), name
        want = x.var().item() if x.numel() > 1 else 0.0
        assert stats.var[i].item() == pytest.approx(want, rel=1e-7), name
        assert stats.norm[i].item() == pytest.approx(x.norm().item(), rel=1e-7), name
    assert stats.mean.dtype == stats.var.dtype == stats.norm.dtype == torch.float32
    assert stats.nonfinite.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", (2, 17, 4099, 200_003))
def test_the_variance_of_a_constant_is_exactly_zero(backend, dtype, count):
    for value in (1.0, 0.1, -1 / 3, 3e-5):
        stats = zk.block_stats(zk.Blocks([("w", torch.full((count,), value, dtype=dtype))]))
        assert stats.var.item() == 0.0
        assert stats.mean.item() == torch.tensor(value, dtype=dtype).item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_weights_are_counted_and_show(backend, dtype):
    theta = weights((70_001,), dtype)
    theta[[0, 500, 65_536, 70_000]] = torch.tensor([math.inf, math.nan, -math.inf, math.nan], dtype=dtype)
    stats = zk.block_stats(zk.Blocks([("w", theta), ("v", weights((5,), dtype))]))
    assert stats.nonfinite.tolist() == [4, 0]
    for value in stats[:3]:
        assert value.isnan().tolist() == [True, False]


def test_large_finite_weights_are_not_taken_for_infinite(backend):
    theta = torch.full((1000,), 3e19)  # the square, 9e38, is beyond fp32
    theta[::2] = -3e19
    stats = zk.block_stats(zk.Blocks([("w", theta)]))
    assert stats.nonfinite.item() == 0
    assert stats.norm.item() == pytest.approx(3e19 * 1000**0.5, rel=1e-6)
    assert stats.var.item() == math.inf  # 9e38 has no fp32


def test_an_empty_block_has_no_mean(backend):
    stats = zk.block_stats(zk.Blocks([("w", torch.empty(0, 4)), ("v", torch.ones(2))]))
    assert stats.mean[0].isnan() and [s[0].item() for s in stats[1:]] == [0, 0, 0]
    assert stats.norm[1].item() == pytest.approx(math.sqrt(2))


def test_statistics_ride_on_every_pass(backend):
    """What an update leaves, what a scratch reads, what a dot reads: the bits of a pass of their own."""
    blocks = zk.Blocks(clones(mixed()))
    options = {"decay": torch.tensor(0.99), "rounding_seed": ROUNDING_SEED}
    riding = zk.update_(blocks, SEEDS, COEFS, None, **options, stats=True)
    assert_same(riding, zk.block_stats(blocks))
    dots, riding = zk.dot_noise(blocks, SEEDS, stats=True)
    assert_same(riding, zk.block_stats(blocks))
    assert torch.equal(dots, zk.dot_noise(blocks, SEEDS))
    for name, tensor in zip(blocks.names, blocks.tensors, strict=True):
        out, mirror = torch.empty_like(tensor), torch.empty_like(tensor)
        alone = zk.block_stats(zk.Blocks([(name, tensor)]))
        assert_same(zk.scratch(tensor, out, 3, SEEDS[0], COEFS[0], mirror=mirror, stats=True), alone)
        riding = zk.update_scratch_(
            tensor, out, 3, SEEDS, COEFS, None, SEEDS[0], COEFS[0], rounding_seed=ROUNDING_SEED, stats=True
        )
        assert_same(riding, zk.block_stats(zk.Blocks([(name, tensor)])))
