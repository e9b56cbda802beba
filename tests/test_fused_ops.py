"""Passes that do several things at once give the bits of the calls they replace, on every CPU backend."""

from __future__ import annotations

import pytest
import torch
from test_ops import COEFS, DISTS, DTYPES, ROUNDING_SEED, SEEDS, SHAPES, assert_same_bits, bits, clones, mixed, weights

import zo_kernels as zk

NEXT = {"next_seed": zk.seed_tensor(2**63 + 1), "next_coef": torch.tensor(-2e-3), "next_scale": torch.tensor(1.5)}
SIZE = (NEXT["next_coef"] * NEXT["next_scale"]).abs()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("above", (None, 1.0, 1.1), ids=("nearest", "equal", "stochastic"))
@pytest.mark.parametrize("dist", DISTS)
def test_a_mirror_is_the_scratch_of_the_other_sign(backend, shape, dtype, above, dist):
    theta, call = weights(shape, dtype), {"dist": dist}
    if above is not None:
        call["nearest_above"] = SIZE * above
    want = [torch.empty_like(theta) for _ in range(2)]
    for out, coef in zip(want, (SIZE, -SIZE), strict=True):
        zk.scratch(theta, out, 9, SEEDS[0], coef, **call)
    out, mirror = torch.empty_like(theta), torch.empty_like(theta)
    zk.scratch(theta, out, 9, SEEDS[0], SIZE, mirror=mirror, **call)
    assert_same_bits([out, mirror], want)
    assert theta.numel() == 1 or not torch.equal(bits(out), bits(mirror))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mirror_of_rows_is_the_rows_of_the_mirror(backend, dtype):
    theta, rows = weights((50, 33), dtype), torch.tensor([3, 0, 49, 3])
    call = {"nearest_above": torch.tensor(1.0)}
    whole, some = ([torch.empty(n, 33, dtype=dtype) for _ in range(2)] for n in (50, 4))
    zk.scratch(theta, whole[0], 5, SEEDS[1], COEFS[0], mirror=whole[1], **call)
    zk.scratch(theta, some[0], 5, SEEDS[1], COEFS[0], mirror=some[1], rows=rows, **call)
    assert_same_bits(some, [w[rows] for w in whole])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("above", (None, 1.1), ids=("nearest", "stochastic"))
@pytest.mark.parametrize("with_mirror", (False, True))
def test_an_update_with_the_next_scratch_is_the_two_calls(backend, shape, dtype, dist, above, with_mirror):
    """The scratch starts from the weights as they are stored, rounded."""
    theta, scale, decay = weights(shape, dtype), torch.tensor([0.5, 2.0, 1.0]), torch.tensor(0.999)
    outs = [torch.empty_like(theta) for _ in range(2 if with_mirror else 1)]
    want = [torch.empty_like(theta) for _ in outs]
    nearest_above = None if above is None else SIZE * above
    call = {"nearest_above": nearest_above, "dist": dist}
    blocks = zk.Blocks([("w", theta.clone())], {"w": 9})
    zk.update_(blocks, SEEDS, COEFS, scale[:, None], decay=decay, rounding_seed=ROUNDING_SEED, dist=dist)
    mirror = want[1] if with_mirror else None
    zk.scratch(blocks.tensors[0], want[0], 9, *NEXT.values(), mirror=mirror, **call)

    fused = theta.clone()
    zk.update_scratch_(
        fused, outs[0], 9, SEEDS, COEFS, scale, *NEXT.values(),
        mirror=outs[1] if with_mirror else None, decay=decay, rounding_seed=ROUNDING_SEED, **call,
    )  # fmt: skip
    assert_same_bits([fused, *outs], [blocks.tensors[0], *want])
    assert not torch.equal(bits(fused), bits(theta))
    single = theta.clone()  # one scale for all directions, none at all
    zk.update_scratch_(single, outs[0], 9, SEEDS, COEFS, torch.tensor(1.0), *NEXT.values())
    plain = theta.clone()
    zk.update_scratch_(plain, outs[0], 9, SEEDS, COEFS, None, *NEXT.values())
    assert torch.equal(bits(single), bits(plain))


@pytest.mark.parametrize("dist", DISTS)
def test_a_scale_per_direction_is_a_scale_in_the_coefficient(backend, dist):
    """fl32(coef_k * scale_kb), one block at a time."""
    named = mixed()
    scale = torch.rand(3, len(named), generator=torch.Generator().manual_seed(1)) + 0.5
    together = zk.Blocks(clones(named))
    zk.update_(together, SEEDS, COEFS, scale, rounding_seed=ROUNDING_SEED, dist=dist)
    for b, pair in enumerate(clones(named)):
        alone = zk.Blocks([pair])
        zk.update_(alone, SEEDS, COEFS * scale[:, b], rounding_seed=ROUNDING_SEED, dist=dist)
        assert torch.equal(bits(alone.tensors[0]), bits(together.tensors[b]))
    shared = zk.Blocks(clones(named))
    zk.update_(shared, SEEDS, COEFS, scale[0], rounding_seed=ROUNDING_SEED, dist=dist)
    same = zk.Blocks(clones(named))
    zk.update_(same, SEEDS, COEFS, scale[:1].repeat(3, 1), rounding_seed=ROUNDING_SEED, dist=dist)
    assert_same_bits(shared.tensors, same.tensors)


@pytest.mark.parametrize("dist", DISTS)
def test_the_two_noise_pass_is_the_three_passes_it_replaces(backend, dist):
    """Way back with the update, then the next perturbation.  fp32 weights: every pass ends with the value that the
    fused one has in its register.  In 16 bits the fused pass rounds once instead of twice."""
    eps, step = torch.tensor(1e-3), torch.tensor(-3e-4)
    named = [(f"w{i}", weights(shape, seed=i)) for i, shape in enumerate(SHAPES)]
    scales = torch.rand(2, len(named), generator=torch.Generator().manual_seed(1)) + 0.5
    apart, fused = zk.Blocks(clones(named)), zk.Blocks(clones(named))
    zk.update_(apart, SEEDS[:1], (eps + step)[None], scales[0], dist=dist)
    zk.perturb_(apart, SEEDS[1], eps, scales[1], dist=dist)
    zk.update_(fused, SEEDS[:2], torch.stack([eps + step, eps]), scales, dist=dist)
    assert_same_bits(fused.tensors, apart.tensors)


@pytest.mark.parametrize("dist", DISTS)
def test_a_dot_with_noise_is_the_sum_of_products_in_fp64(backend, dist):
    """Budget: one fp32 rounding of each product and of the result, and 2^-24 of the products' sizes for fp32 sums in
    a chunk (the CPU has none)."""
    named = mixed()
    blocks = zk.Blocks(named, offsets=[128 * i for i in range(len(named))])
    dots = zk.dot_noise(blocks, SEEDS, dist=dist)
    assert dots.shape == (3, len(named)) and dots.dtype == torch.float32
    for k, seed in enumerate(SEEDS):
        for b, tensor in enumerate(blocks.tensors):
            z = zk.draw_noise(tuple(tensor.shape), seed, blocks.ids[b], start=blocks.offsets[b], dist=dist)
            products = tensor.double() * z.double()
            budget = 2.0**-23 * products.abs().sum() + 1e-30
            assert (dots[k, b].double() - products.sum()).abs() <= budget
    assert torch.equal(zk.dot_noise(blocks, SEEDS[1:2], dist=dist)[0], dots[1])


def test_a_dot_with_its_own_noise_is_the_square_norm(backend):
    z = zk.draw_noise(70_001, SEEDS[0], 5)
    dots = zk.dot_noise(zk.Blocks([("z", z)], {"z": 5}), SEEDS[:2])
    assert dots[0].item() == pytest.approx(z.double().square().sum().item(), rel=1e-6)
    assert abs(dots[1].item()) < 5 * 70_001**0.5  # another direction: five standard deviations around 0
