"""Rounding: fma and round_stochastic against exact arithmetic, and what a rounded scratch realises."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zo_kernels as zk
from zo_kernels import noise as contract
from zo_kernels.rounding import fma, round_stochastic

HALVES = (torch.bfloat16, torch.float16)


def exact_float32(x: Fraction) -> float:
    """x rounded once to fp32, half to even, subnormals and overflow included."""
    if x == 0:
        return 0.0
    exponent = math.frexp(float(abs(x)))[1] - 1 if abs(x) >= Fraction(2) ** -140 else -140
    step = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(x / step) * step  # Fraction rounds half to even
    return math.copysign(math.inf, x) if abs(rounded) >= Fraction(2) ** 128 else float(rounded)


def assert_fma_exact(a, b, c):
    a, b, c = (torch.as_tensor(v, dtype=torch.float32).reshape(-1) for v in (a, b, c))
    ours = fma(a, b, c).tolist()
    for x, y, z, got in zip(a.tolist(), b.tolist(), c.tolist(), ours, strict=True):
        assert got == exact_float32(Fraction(x) * Fraction(y) + Fraction(z)), (x.hex(), y.hex(), z.hex())


def test_fma_where_rounding_twice_goes_wrong():
    tiny = 2.0**-23
    # 1 + 2^-23 + (2^-24 - 2^-70): below the midpoint, but fp64 rounds it to the midpoint and a tie goes up.
    a, b, c = (1 + tiny) * 2.0**-12, (1 - tiny) * 2.0**-12, 1 + tiny
    twice = torch.tensor(a * b + c, dtype=torch.float64).to(torch.float32).item()
    assert twice != exact_float32(Fraction(a) * Fraction(b) + Fraction(c))
    signs = [(sa, sc) for sa in (1, -1) for sc in (1, -1)]
    for scale in (1.0, 2.0**100, 2.0**-100):
        assert_fma_exact([s * a for s, _ in signs], [b * scale] * 4, [s * c * scale for _, s in signs])


def test_fma_on_random_bits():
    """Operands of close and of any exponents, cancelling sums (c = -fl(a b)), subnormals and overflow."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(3000, generator=generator) for _ in range(2))
    close = torch.randn(3000, generator=generator)
    spread = close * 2.0 ** torch.randint(-60, 60, (3000,), generator=generator).float()
    for c in (close, spread, -(a * b), torch.zeros(3000)):
        assert_fma_exact(a, b, c)
    assert_fma_exact(a * 2.0**-70, b * 2.0**-70, close * 2.0**-140)
    assert_fma_exact(a * 2.0**64, b * 2.0**63, close.clamp(-1.9, 1.9) * 2.0**127)


@settings(max_examples=300, deadline=None)
@given(*[st.floats(width=32, allow_nan=False, allow_infinity=False)] * 3)
def test_fma_on_any_three_floats(a, b, c):
    assert_fma_exact(a, b, c)


def test_fma_follows_ieee_754_at_infinities_and_zeros():
    a = torch.tensor([math.inf, 1.0, math.nan, 0.0, math.inf, -0.0, 0.0])
    b = torch.tensor([1.0, 1.0, 1.0, math.inf, 1.0, 1.0, -1.0])
    c = torch.tensor([1.0, -math.inf, 1.0, 1.0, -math.inf, -0.0, 0.0])
    got = fma(a, b, c).tolist()
    assert got[:2] == [math.inf, -math.inf]
    assert all(math.isnan(x) for x in got[2:5])
    assert [math.copysign(1, x) for x in got[5:]] == [-1.0, 1.0]


def place(x: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The neighbours of |x| in `dtype`, towards and away from zero (2^16 or 2^128 for infinity), and
    floor(2^16 frac), by float64 arithmetic instead of bit patterns."""
    digits, smallest, top = (8, -126, 128) if dtype == torch.bfloat16 else (11, -14, 16)
    magnitude = np.abs(x.astype(np.float64))
    exponent = np.maximum(np.frexp(magnitude)[1] - 1, smallest)
    step = np.ldexp(1.0, exponent - (digits - 1))
    below = np.floor(magnitude / step) * step
    frac = np.floor((magnitude - below) / step * 65536)
    beyond = magnitude >= 2.0**top
    return np.where(beyond, np.inf, below), np.where(beyond, np.inf, below + step), frac


def rounded_away(x: np.ndarray, r: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    below, above, frac = place(x, dtype)
    top = 2.0 ** (128 if dtype == torch.bfloat16 else 16)
    magnitude = np.where(r + frac >= 65536, above, below)
    return np.copysign(np.where(magnitude >= top, np.inf, magnitude), x)


def patterns() -> torch.Tensor:
    """fp32 of every kind: 100,000 random bit patterns, 100,000 in fp16's range, edges and neighbours."""
    generator = torch.Generator().manual_seed(2)
    anything = (
        torch.randint(-(2**31), 2**31, (100_000,), generator=generator).to(torch.int32).view(torch.float32)
    )
    around = torch.randn(100_000, generator=generator) * 2.0 ** torch.randint(
        -30, 17, (100_000,), generator=generator
    )
    edges = torch.tensor(
        [0.0, 1.0, 2.0**-14, 2.0**-24, 2.0**-25, 65504.0, 65519.0, 65520.0, 65535.0, 65536.0, 2.0**-149]
    )
    below = torch.nextafter(edges, torch.tensor(-math.inf))
    x = torch.cat([anything, around, edges, below, -edges, -below])
    return x[x.isfinite()]


@pytest.mark.parametrize("dtype", HALVES)
def test_round_stochastic_is_the_contracts_rule(dtype):
    x = patterns()
    for r in (torch.randint(0, 65536, x.shape), torch.zeros_like(x).long(), torch.full(x.shape, 65535)):
        got = round_stochastic(x, r, dtype).double().numpy()
        want = rounded_away(x.numpy(), r.numpy(), dtype)
        assert (got == want).all()
        assert (np.signbit(got) == np.signbit(want)).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_cpu_rounds_every_kind_of_float_by_the_same_rule(dtype):
    """5,000 blocks of one element: each reaches fp32 x as 0 + 1 * x * (+1 or -1)."""
    if reason := zk.why_unavailable("cpu"):
        pytest.skip(reason)
    x = patterns()
    x = torch.cat([x[:2400], x[-2600:]])
    ids = {f"b{i}": i for i in range(len(x))}
    blocks = zk.Blocks([(name, torch.zeros(1, dtype=dtype)) for name in ids], ids)
    seed, rounding_seed = zk.seed_tensor(5), zk.seed_tensor(6)
    with zk.use_backend("cpu"):
        zk.update_(blocks, seed.reshape(1), torch.ones(1), x, rounding_seed=rounding_seed, dist="rademacher")
    places, numbers = torch.zeros(len(x), dtype=torch.int64), torch.arange(len(x))
    r = contract.rounding_bits(places, rounding_seed, numbers)
    signed = x * contract.rademacher(places, seed, numbers)
    got = torch.cat(blocks.tensors).double().numpy()
    assert (got == rounded_away(signed.numpy(), r.numpy(), dtype)).all()


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
def test_round_stochastic_converts_what_is_not_finite(dtype):
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    r = torch.full((3,), 65535)
    assert round_stochastic(nan, r, dtype).isnan().all()
    x = torch.tensor([math.inf, -math.inf, -0.0])
    assert torch.equal(round_stochastic(x, r, dtype).float(), x)
    assert round_stochastic(x, r, dtype)[2].signbit()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", (1.0009, -0.0199, 3.1e-5))
def test_stochastic_rounding_is_unbiased(backend, dtype, value):
    """The mean of 4e5 roundings within 3e-5 of the value (5 standard errors where an ulp is 2^-7 of it)."""
    count = 400_000
    blocks = zk.Blocks([("w", torch.zeros(count, dtype=dtype))])
    zk.update_(
        blocks,
        zk.seed_tensor([1]),
        torch.tensor([value]),
        rounding_seed=zk.seed_tensor(2),
        dist="rademacher",
    )
    signs = zk.draw_noise(count, zk.seed_tensor(1), blocks.ids[0], dist="rademacher")
    values = blocks.tensors[0].double() * signs
    x = torch.tensor(value, dtype=torch.float32).item()
    assert abs(values.mean().item() / x - 1) < 3e-5
    below, above, _ = place(np.array([x]), dtype)
    assert set(values.abs().unique().tolist()) == {below[0], above[0]}


def test_the_rounding_seed_decides_the_rounding(backend):
    def run(seed):
        blocks = zk.Blocks([("w", torch.ones(1000, dtype=torch.bfloat16))])
        zk.update_(blocks, zk.seed_tensor([1]), torch.tensor([1e-3]), rounding_seed=zk.seed_tensor(seed))
        return blocks.tensors[0]

    assert torch.equal(run(2), run(2))
    assert not torch.equal(run(2), run(3))


def realised_share(theta: torch.Tensor, eps: float, nearest_above: torch.Tensor | None) -> float:
    """<d, z> / <z, z> of the perturbation eps * z that reached the scratch, d = (scratch - theta) / eps."""
    out, seed = torch.empty_like(theta), zk.seed_tensor(3)
    zk.scratch(theta, out, 4, seed, torch.tensor(eps), nearest_above=nearest_above)
    z = zk.draw_noise(theta.numel(), seed, 4)
    d = (out.float() - theta.float()).double()
    return (torch.dot(d, z.double()) / torch.dot(z, z).double()).item() / eps


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", (0.02, 1.0, 2.0))
@pytest.mark.parametrize("eps", (1e-3, 1e-4))
@pytest.mark.parametrize("spread", (0.0, 1.0), ids=("constant", "normal"))
def test_a_scratch_realises_the_perturbation(dtype, size, eps, spread):
    """Nearest from eps = ulp(largest weight) on, stochastic below.  The standard error of the share is
    sqrt(ulp / eps * E|z| / N), at most 0.0039 (bf16, weights above 2, eps 1e-4, N = 2^23)."""
    if reason := zk.why_unavailable("cpu"):
        pytest.skip(reason)
    theta = torch.randn(1 << 23).mul_(spread * size).add_(0.0 if spread == 1.0 else size).to(dtype)
    with zk.use_backend("cpu"):
        share = realised_share(theta, eps, zk.ulp(theta.abs().max().float(), dtype))
    assert 0.98 < share < 1.02


def test_the_reference_realises_it_too():
    theta = torch.ones(1 << 18, dtype=torch.bfloat16)  # standard error sqrt(7.8 * 0.8 / 2^18) = 0.005
    with zk.use_backend("reference"):
        assert 0.98 < realised_share(theta, 1e-3, zk.ulp(torch.tensor(1.0), torch.bfloat16)) < 1.02


def test_plain_nearest_loses_most_of_it(backend):
    """Why scratch has nearest_above: in bf16, 1.0 moves by 2^-8 or -2^-9 or not at all."""
    theta = torch.ones(1 << 18, dtype=torch.bfloat16)
    assert realised_share(theta, 1e-3, None) == pytest.approx(0.23, abs=0.03)


def test_ulp_is_the_distance_to_the_next_number():
    for dtype in (torch.float32, *HALVES):
        x = torch.cat(
            [torch.randn(1000) * 2.0 ** torch.randint(-20, 10, (1000,)), torch.tensor([1.0, 0.0])]
        ).to(dtype)
        x = x.abs()
        step = torch.nextafter(x, torch.tensor(math.inf, dtype=dtype)).double() - x.double()
        assert torch.equal(zk.ulp(x.float(), dtype).double(), step)
