"""The noise of the Triton backend: words, signs and normals against the contract, and the same bits in every pass."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest
import torch
import triton_target
from triton_target import DTYPES, SEEDS, TENSOR_ID, noise, stats_of, words

from zo_kernels.backends import reference
from zo_kernels.blocks import Blocks
from zo_kernels.noise import rademacher
from zo_kernels.ops import seed_tensor

interpreted, target = triton_target.interpreted, triton_target.target  # fixtures

FAR = 2**31 + 5000  # elements, beyond what an int32 counts


def test_the_backends_have_the_same_functions(interpreted):
    for name in ("words", "noise", "axpy_", "update_state_", "scratch", "update_scratch_", "dot_noise", "block_stats"):
        assert inspect.signature(getattr(interpreted, name)) == inspect.signature(getattr(reference, name))


def test_importing_the_package_imports_no_triton():
    check = "import sys, zo_kernels; assert not any(m.split('.')[0] == 'triton' for m in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_cpu_tensors_are_refused_outside_the_interpreter():
    backend = importlib.import_module("zo_kernels.backends.triton")
    if not backend.launch.HARDWARE.value:
        pytest.skip("TRITON_INTERPRET is set")
    with pytest.raises(ValueError, match="needs cuda tensors, got cpu"):
        backend.noise(torch.empty(8), seed_tensor(1), 1, 0, "normal")


@pytest.mark.parametrize(
    ("group", "tensor_id", "stream", "seed", "expected"),
    [
        (0, 0, 0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, 0xFFFFFFFF, 0xFFFFFFFF, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x85A308D3243F6A88 - 2**64,
            0x13198A2E,
            0x03707344,
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_words_pass_the_random123_known_answers(target, group, tensor_id, stream, seed, expected):
    out = torch.empty((1, 4), dtype=torch.int32, device=target.device)
    target.backend.words(out, seed_tensor(seed, target.device), tensor_id, stream, group)
    assert tuple(word & 0xFFFFFFFF for word in out[0].tolist()) == expected


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("stream", "first_group"), [(0, 0), (1, 2**32 - 3), (0xFFFFFFFF, 2**40 + 1)])
def test_words_equal_the_reference(target, seed, stream, first_group):
    for groups in (1, 7, 2051):
        actual = words(target.backend, groups, seed, stream, first_group, target.device)
        assert torch.equal(actual, words(reference, groups, seed, stream, first_group))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("start", [0, 1, 127, 2**35 - 7, 2**41 + 3])
def test_signs_equal_the_reference(target, seed, start):
    for numel in (5, 2500):
        actual = noise(target.backend, numel, seed, start, "rademacher", target.device)
        assert torch.equal(actual, noise(reference, numel, seed, start, "rademacher"))


@pytest.mark.parametrize("start", [0, 2**35 - 6, 2**41 + 2])
def test_normals_are_within_the_budget(target, start):
    for seed in SEEDS:
        actual = noise(target.backend, 4098, seed, start, "normal", target.device)
        expected = noise(reference, 4098, seed, start, "normal")
        radius = expected.double().view(-1, 2).norm(dim=1).repeat_interleave(2)
        assert ((actual.double() - expected.double()).abs() <= target.budget(radius)).all()
        odd = noise(target.backend, 1003, seed, start + 1, "normal", target.device)
        assert torch.equal(odd, actual[1:1004])


def test_a_stream_has_noise_of_its_own(target):
    seed = seed_tensor(SEEDS[1], target.device)
    z = torch.empty(1000, device=target.device)
    target.backend.noise(z, seed, TENSOR_ID, 2**40 + 3, "rademacher", 2)
    elements = torch.arange(1000) + 2**40 + 3
    assert torch.equal(z.cpu(), rademacher(elements, seed.cpu(), TENSOR_ID, 2))


def test_nothing_to_draw_launches_nothing(target):
    assert words(target.backend, 0, 1, 0, 0, target.device).shape == (0, 4)
    assert noise(target.backend, 0, 1, 0, "normal", target.device).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pass_has_the_same_normals(target, dtype):
    """Out of zeros, 1 * z leaves z itself; the product with a unit vector picks one z.  On a GPU at real sizes."""
    backend, device = target.backend, target.device
    numel = 3000 if device.type == "cpu" else 50_000_003
    seed, one = seed_tensor(SEEDS[1], device), torch.ones((), device=device)
    z = torch.empty(numel, device=device)
    backend.noise(z, seed, TENSOR_ID, 0, "normal")
    stored = z.to(dtype)

    theta = torch.zeros(numel, dtype=dtype, device=device)
    out, mirror = torch.empty_like(theta), torch.empty_like(theta)
    backend.scratch(theta, out, mirror, TENSOR_ID, seed, one, None, None, None, "normal", None)
    assert torch.equal(out, stored) and torch.equal(mirror, -stored)

    blocks = Blocks([("theta", theta)], ids={"theta": TENSOR_ID})
    backend.axpy_(blocks, seed.reshape(1), one.reshape(1), None, None, None, "normal", None)
    assert torch.equal(theta, stored)

    nothing = torch.zeros((1,), device=device)
    theta.zero_()
    update = (seed.reshape(1), nothing, None, None, None)
    backend.update_scratch_(theta, out, None, TENSOR_ID, *update, seed, one, None, None, "normal", None)
    assert torch.equal(out, stored) and not theta.any()

    dot = torch.empty((1, 1), device=device)
    for place in (0, numel // 3, numel - 1):
        theta.zero_()[place] = 1
        backend.dot_noise(blocks, seed.reshape(1), dot, "normal", None)
        assert dot.item() == z[place].item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of 20 GB")
def test_elements_beyond_int32_are_reached_on_a_gpu():
    """Signs are exact in bf16, so the far end of every pass is compared bit for bit."""
    backend, device = importlib.import_module("zo_kernels.backends.triton"), torch.device("cuda", 0)
    seed, one = seed_tensor(SEEDS[2], device), torch.ones((), device=device)
    expected = noise(reference, 10_000, SEEDS[2], FAR - 10_000, "rademacher").to(torch.bfloat16)
    theta = torch.zeros(FAR, dtype=torch.bfloat16, device=device)
    out, mirror = torch.empty_like(theta), torch.empty_like(theta)
    blocks = Blocks([("theta", theta)], ids={"theta": TENSOR_ID})

    backend.scratch(theta, out, mirror, TENSOR_ID, seed, one, None, None, None, "rademacher", None)
    assert torch.equal(out[-10_000:].cpu(), expected) and torch.equal(mirror[-10_000:].cpu(), -expected)
    backend.axpy_(blocks, seed.reshape(1), one.reshape(1), None, None, None, "rademacher", None)
    assert torch.equal(theta, out)

    theta.zero_()[-3000:] = 1
    dot, stats = torch.empty((1, 1), device=device), stats_of(1, device)
    backend.dot_noise(blocks, seed.reshape(1), dot, "rademacher", stats)
    assert dot.item() == expected[-3000:].float().sum().item()
    assert abs(stats.mean.item() * FAR / 3000 - 1) < 1e-6
    theta[-1] = torch.nan
    backend.block_stats(blocks, stats)
    assert stats.nonfinite.item() == 1 and stats.mean.isnan().item()

    del out, mirror
    rows = torch.tensor([FAR // 1000 - 1, 0], device=device)
    table = theta[: FAR // 1000 * 1000].view(-1, 1000)
    some = torch.empty((2, 1000), dtype=torch.bfloat16, device=device)
    backend.scratch(table.zero_(), some, None, TENSOR_ID, seed, one, None, None, rows, "rademacher", None)
    start = int(rows[0]) * 1000
    assert torch.equal(some[0].cpu(), noise(reference, 1000, SEEDS[2], start, "rademacher").to(torch.bfloat16))
