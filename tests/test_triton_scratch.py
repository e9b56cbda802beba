"""`scratch` and `update_scratch_` of the Triton backend against the reference; fused passes against the separate ones,
bit for bit."""

from __future__ import annotations

import pytest
import torch
import triton_target
from triton_target import DTYPES, TENSOR_ID, assert_rounded, put, put_seed, scratches, stats_of, step_error

from zo_kernels import noise as contract
from zo_kernels.backends import reference
from zo_kernels.blocks import Blocks
from zo_kernels.ops import seed_tensor

interpreted, target = triton_target.interpreted, triton_target.target  # fixtures

SEED = 2**64 - 3


@pytest.fixture(params=DTYPES, ids=str)
def theta(request):
    return torch.randn((37, 113), generator=torch.Generator().manual_seed(4)).to(request.param)


@pytest.mark.parametrize("nearest_above", [None, 1e-3, 1.0])
def test_scratch_equals_the_reference(target, theta, nearest_above):
    """The step is -2e-3: below 1.0 it rounds stochastically, above 1e-3 to nearest."""
    options = {"seed": SEED, "scale": 0.5, "nearest_above": nearest_above, "mirror": True}
    place = theta.to(target.device)
    expected = scratches(reference, theta, -4e-3, "rademacher", **options)
    for ours, theirs in zip(scratches(target.backend, place, -4e-3, "rademacher", **options), expected, strict=True):
        assert torch.equal(ours, theirs)
    to_nearest = scratches(reference, theta, -4e-3, "rademacher", scale=0.5)[0]
    assert torch.equal(expected[0], to_nearest) == (theta.dtype == torch.float32 or nearest_above != 1.0)

    bits = None
    if nearest_above == 1.0:
        bits = contract.rounding_bits(torch.arange(theta.numel()).view(theta.shape), seed_tensor(SEED), TENSOR_ID)
    accs = scratches(reference, theta.float(), -4e-3, "normal", **options)
    for ours, acc in zip(scratches(target.backend, place, -4e-3, "normal", **options), accs, strict=True):
        assert_rounded(ours, acc, step_error(target, acc, [-4e-3]), bits)
    assert torch.equal(place.cpu(), theta)


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("nearest_above", [None, 1.0])
def test_both_signs_from_one_read_are_the_two_passes(target, theta, nearest_above, shift):
    place = theta.to(target.device)
    options = {"nearest_above": nearest_above, "shift": shift}
    both = scratches(target.backend, place, 3e-3, "normal", mirror=True, **options)
    for out, coef in zip(both, (3e-3, -3e-3), strict=True):
        assert torch.equal(out, scratches(target.backend, place, coef, "normal", nearest_above=nearest_above)[0])
    assert not torch.equal(*both)


@pytest.mark.parametrize("shape", [(12, 128), (8, 384), (16, 33), (40,), (40, 3, 7)], ids=str)
def test_scratch_of_rows_is_a_part_of_the_whole(target, monkeypatch, shape):
    """Rows that begin inside a span, repeat, or have any width: the noise and rounding of their place."""
    monkeypatch.setattr(target.backend.launch, "BLOCK", 256)
    monkeypatch.setattr(target.backend.launch, "SPAN", 512)
    theta = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    rows, options = [shape[0] - 1, 0, 7, 7, 2], {"nearest_above": 1.0, "mirror": True}
    place = theta.to(target.device)
    expected = scratches(reference, theta, 1e-3, "rademacher", rows=rows, **options)
    for shift in (0, 1):
        actual = scratches(target.backend, place, 1e-3, "rademacher", rows=rows, shift=shift, **options)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    whole = scratches(target.backend, place, 1e-3, "normal", **options)
    part = scratches(target.backend, place, 1e-3, "normal", rows=rows, **options)
    assert torch.equal(part[0], whole[0][rows]) and torch.equal(part[1], whole[1][rows])


@pytest.mark.parametrize("offset", [256, 2**33 + 1000])
def test_the_scratch_of_a_shard_has_the_noise_of_its_place(target, monkeypatch, offset):
    monkeypatch.setattr(target.backend.launch, "BLOCK", 256)
    monkeypatch.setattr(target.backend.launch, "SPAN", 512)
    theta = torch.randn(1111, generator=torch.Generator().manual_seed(4)).bfloat16()
    place, options = theta.to(target.device), {"nearest_above": 1.0, "mirror": True}
    expected = scratches(reference, theta, 1e-3, "rademacher", offset=offset, **options)
    actual = scratches(target.backend, place, 1e-3, "rademacher", offset=offset, **options)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    whole = scratches(target.backend, place, 1e-3, "normal", offset=offset, **options)
    for first, end in ((0, 1), (1, 700), (700, 1111)):
        part = scratches(target.backend, place[first:end].clone(), 1e-3, "normal", offset=offset + first, **options)
        assert torch.equal(part[0], whole[0][first:end]) and torch.equal(part[1], whole[1][first:end])


def test_no_rows_launch_nothing(target):
    theta = torch.ones(3, 4, device=target.device)
    assert scratches(target.backend, theta, 1.0, "normal", rows=[])[0].shape == (0, 4)


CASES = {  # coefs, scale, decay, rounding seed, nearest_above
    "nearest": ([-2e-3], None, None, None, None),
    "stochastic": ([-2e-3], 0.5, 0.99, 9, 1.0),
    "2": ([-2e-3, 1e-2], [0.5, 2.0], None, 9, None),
    "any": ([-2e-3, 1e-2, 3e-3], 0.5, 0.99, None, 1.0),
}


def update_then_scratch(module, theta, case, dist, *, fused, mirror=True, shift=0, stats=None):
    """theta, out and mirror on the CPU: by `update_scratch_`, or by `axpy_` and `scratch`."""
    coefs, scale, decay, rounding, nearest_above = CASES[case]
    device, size = theta.device, theta.numel()
    theta = theta.clone()
    storage = torch.empty((2, size + 24 - size % 8), dtype=theta.dtype, device=device)
    out, other = (row[shift : shift + size].view(theta.shape) for row in storage)
    update = (seed_tensor(range(len(coefs)), device), put(coefs, device))
    after = (put(decay, device), put_seed(rounding, device))
    probe = (put_seed(SEED, device), put(4e-3, device), put(0.75, device), put(nearest_above, device))
    targets = (theta, out, other if mirror else None, TENSOR_ID)
    if fused:
        module.update_scratch_(*targets, *update, put(scale, device), *after, *probe, dist, stats)
    else:
        scales = None if scale is None else torch.tensor(scale, device=device).view(-1, 1).expand(len(coefs), 1)
        blocks = Blocks([("theta", theta)], ids={"theta": TENSOR_ID})
        module.axpy_(blocks, *update, None if scales is None else scales.contiguous(), *after, dist, None)
        module.scratch(*targets, *probe, None, dist, stats)
    return [t.cpu() for t in (theta, out, other)[: 2 + mirror]]


@pytest.mark.parametrize("case", CASES)
def test_update_and_scratch_in_one_pass(target, theta, case):
    """The same bits as the two passes, and, with signs, as the reference; statistics change no bit."""
    place = theta.to(target.device)
    fused = update_then_scratch(target.backend, place, case, "normal", fused=True)
    apart = update_then_scratch(target.backend, place, case, "normal", fused=False)
    for one, two in zip(fused, apart, strict=True):
        assert torch.equal(one, two)
    signs = update_then_scratch(target.backend, place, case, "rademacher", fused=True, stats=stats_of(1, target.device))
    for ours, theirs in zip(signs, update_then_scratch(reference, theta, case, "rademacher", fused=True), strict=True):
        assert torch.equal(ours, theirs)
    alone = update_then_scratch(target.backend, place, case, "rademacher", fused=True, mirror=False, shift=1)
    assert torch.equal(alone[0], signs[0]) and torch.equal(alone[1], signs[1])
    assert not torch.equal(fused[0], theta) and not torch.equal(fused[1], fused[0])
