"""Merging a product of two thin factors into a weight: the sum, and its rounding by the bits of the noise contract."""

from __future__ import annotations

import pytest
import torch

import zo_kernels as zk
from zo_kernels import low_rank
from zo_kernels.noise import rounding_bits
from zo_kernels.rounding import round_stochastic

SEED, TENSOR_ID = zk.seed_tensor(2**63 + 5), 0xDEADBEEF
SHAPES = [(5, 7, 1), (33, 20, 3), (1, 9, 2), (9, 1, 1)]


def factors(m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(m, n), torch.randn(k, m), torch.randn(k, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sum_is_rounded_with_the_bits_of_its_elements(backend, shape, dtype, monkeypatch):
    monkeypatch.setattr(low_rank, "PIECE", 64)  # several pieces, which begin inside a group of eight
    theta, left, right = factors(*shape)
    theta, decay = theta.to(dtype), torch.tensor(0.9)
    out = torch.empty_like(theta)
    zk.add_product(theta, left, right, TENSOR_ID, SEED, decay=decay, out=out)
    exact = torch.addmm(theta.float() * decay, left.t(), right)
    if dtype == torch.float32:
        assert torch.allclose(out, exact, rtol=1e-6, atol=1e-6)
    else:
        bits = rounding_bits(torch.arange(theta.numel()), SEED, TENSOR_ID).view(theta.shape)
        # The product's last bit depends on how many rows it has: a few elements may round the other way.
        assert (out == round_stochastic(exact, bits, dtype)).float().mean() > 0.95
        assert ((out.float() - exact).abs() <= zk.ulp(exact, dtype)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_changes_survive_on_average(cpu, dtype):
    theta = torch.ones(64, 64, dtype=dtype)
    step = torch.full((1, 64), 1e-3), torch.full((1, 64), 0.1)  # 1e-4, an 80th of the spacing of bf16 at 1
    moved = []
    for seed in range(32):
        out = torch.empty_like(theta)
        zk.add_product(theta, *step, TENSOR_ID, zk.seed_tensor(seed), out=out)
        moved.append((out.float() - 1).mean())
    sigma = (1e-4 * zk.ulp(torch.tensor(1.0), dtype) / (32 * 4096)).sqrt()
    assert abs(torch.stack(moved).mean() - 1e-4) < 5 * sigma


def test_infinities_stay_what_they_are(cpu):
    theta = torch.tensor([[float("inf"), -float("inf"), float("nan"), 1.0]], dtype=torch.bfloat16)
    zk.add_product(theta, torch.zeros(1, 1), torch.zeros(1, 4), TENSOR_ID, SEED)
    assert theta[0, 0] == float("inf") and theta[0, 1] == -float("inf") and theta[0, 2].isnan() and theta[0, 3] == 1


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"no product of \(2, 3\) and \(1, 4\) adds to \(3, 4\)"):
        zk.add_product(torch.zeros(3, 4), torch.zeros(2, 3), torch.zeros(1, 4), TENSOR_ID, SEED)
