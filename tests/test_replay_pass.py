"""`replay_`: K steps in one pass have the bits of K passes on every backend, random signs those of the reference."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import triton_target
from triton_target import DTYPES, blocks_of, misfits, mixed, put

import zo_kernels as zk
from zo_kernels.backends import cpu, reference
from zo_kernels.passes import one_by_one

interpreted = triton_target.interpreted  # a fixture
PASSES = (1, 2, 1, 3)
STOCHASTIC = (True, False, True, True)
SEEDS = zk.seed_tensor([7, 2**63 + 5, 2**63 + 5, 0, 2**64 - 1, 3, 3])
COEFS = [1e-3, -3e-2, 2e-2, 1e-2, 2e-3, -1e-2, 4e-3]
ROUNDING = zk.seed_tensor([11, 12, 13, 14])
CASES = {  # decays, scale, rounded by seeds
    "plain": (False, None, True),
    "decay": (True, "block", True),
    "scales": (True, "direction", False),
    "nearest": (False, "direction", False),
}


def options(case, count, device):
    decay, scale, rounded = CASES[case]
    shape = {"block": (count,), "direction": (len(COEFS), count), None: (0,)}[scale]
    scales = torch.linspace(0.5, 2, torch.Size(shape).numel()).view(shape).to(device)
    return (
        SEEDS.to(device), put(COEFS, device), None if scale is None else scales, PASSES,
        put([0.99, 1.0, 0.98, 0.97], device) if decay else None,
        ROUNDING.to(device) if rounded else None, STOCHASTIC if rounded else (False,) * 4,
    )  # fmt: skip


def replayed(module, tensors, case, dist, offsets=None):
    blocks = blocks_of(tensors, offsets)
    module.replay_(blocks, *options(case, len(blocks), blocks.device), dist)
    return [tensor.cpu() for tensor in tensors]


def passed(module, tensors, case, dist, offsets=None):
    blocks = blocks_of(tensors, offsets)
    one_by_one(module.axpy_, blocks, *options(case, len(blocks), blocks.device), dist)
    return [tensor.cpu() for tensor in tensors]


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.fixture(params=["cpu", "interpreter", *(["cuda"] if torch.cuda.is_available() else [])])
def target(request):
    if request.param == "cpu":
        return SimpleNamespace(backend=cpu, device="cpu", interpreted=False)
    if request.param == "interpreter":
        return SimpleNamespace(backend=request.getfixturevalue("interpreted"), device="cpu", interpreted=True)
    from zo_kernels.backends import triton

    return SimpleNamespace(backend=triton, device="cuda", interpreted=False)


def lists(interpreted: bool, device: str):
    """(tensors, offsets): the interpreter, which pays for every program and pass, takes a strided tensor of each dtype
    and an aligned one of bf16; others all kinds, and one of two chunks."""
    tensors, offsets = misfits(device)
    if interpreted:
        return [([tensors[k] for k in (1, 7, 13)], None), (mixed()[4:5], None)]
    large = [torch.randn(70_001, generator=torch.Generator().manual_seed(1)).to(device, dtype) for dtype in DTYPES]
    return [(tensors, offsets), (mixed(device), None), (large, None)]


@pytest.mark.parametrize("case", CASES)
def test_one_pass_has_the_bits_of_several(target, case):
    if target.interpreted and case != "decay":
        pytest.skip("the interpreter takes seconds for each")
    for dist in ("normal", "rademacher"):
        for (ours, offsets), (theirs, _) in zip(*(lists(target.interpreted, target.device) for _ in "12"), strict=True):
            assert_equal(replayed(target.backend, ours, case, dist, offsets),
                         passed(target.backend, theirs, case, dist, offsets))  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_random_signs_have_the_bits_of_the_reference(target, case):
    ours, theirs, before = (lists(True, device)[0][0] for device in (target.device, "cpu", "cpu"))
    ours = replayed(target.backend, ours, case, "rademacher")
    assert_equal(ours, replayed(reference, theirs, case, "rademacher"))
    assert not any(torch.equal(*pair) for pair in zip(ours, before, strict=True))


def test_the_op_takes_fp32_weights_in_one_sum():
    theta = [torch.randn(5000)]
    ours, theirs = ([t.clone() for t in theta] for _ in range(2))
    zk.replay_(blocks_of(ours), SEEDS, put(COEFS, "cpu"), passes=PASSES, rounding_seeds=ROUNDING, dist="normal")
    assert_equal(ours, passed(cpu, theirs, "plain", "normal"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"passes": [1, 2]}, "add up to the 7 seeds"),
        ({"passes": [7, 0]}, "must be positive"),
        ({"stochastic": [True]}, "stochastic must be 4 long"),
        ({"decays": torch.ones(3)}, "decays must be float32 of shape"),
        ({"stochastic": [True] * 4}, "needs rounding_seeds"),
    ],
)
def test_wrong_arguments_are_named_before_a_weight_is_touched(changed, message):
    theta = torch.zeros(10)
    with pytest.raises(ValueError, match=message):
        zk.replay_(blocks_of([theta]), SEEDS, put(COEFS, "cpu"), **{"passes": PASSES, **changed})
    assert not theta.any()


@pytest.mark.skipif("not __import__('bench.sass').sass.CUOBJDUMP.exists()", reason="this triton wheel has no cuobjdump")
def test_the_kernel_compiles_for_a_gpu_and_does_not_spill(tmp_path, monkeypatch):
    import contextlib

    from bench.sass import Kernel, accesses, offline
    from zo_kernels.backends import triton as backend

    monkeypatch.setattr(backend.launch, "on", lambda device: contextlib.nullcontext())
    blocks = blocks_of([torch.empty(4096, dtype=torch.bfloat16)])
    with offline() as launches:
        backend.replay_(blocks, *options("decay", 1, "cpu"), "normal")
    kernel = Kernel(launches[0][1], tmp_path)
    assert not kernel.spills() and 16 in accesses(kernel.instructions, "STG")
