"""Forms of a direction and scratches of several directions on the Triton backend, against the reference."""

from __future__ import annotations

import pytest
import torch
import triton_target
from test_forms import FORMS, LIMIT, companions, form_of
from triton_target import DTYPES, SEEDS, TENSOR_ID, blocks_of, put, stats_of

from zo_kernels.backends import reference
from zo_kernels.forms import Form
from zo_kernels.ops import seed_tensor

interpreted, target = triton_target.interpreted, triton_target.target  # fixtures

if triton_target.triton.__version__.startswith("3.6."):
    pytest.skip("Triton 3.6 interprets fma as two roundings", allow_module_level=True)

COEFS = [1e-2, -3e-3, 0.2]


def place(form, device):
    """A form with its tensors on the device."""
    if form is None:
        return None
    state = form.state
    if state is not None:
        state = state.to(device) if isinstance(state, torch.Tensor) else [s.to(device) for s in state]
    return Form(form.kind, state, None if form.value is None else form.value.to(device))


def tensors_of(device="cpu"):
    """Aligned ones of all dtypes, then misfits: an odd address, a transpose, a shard."""
    generator = torch.Generator().manual_seed(2)
    drawn = [torch.randn(2100, generator=generator) * 0.02 for _ in range(6)]
    aligned = [drawn[i][:size].to(dtype) for i, (size, dtype) in enumerate(zip((1003, 2051, 1), DTYPES, strict=True))]
    cut = [drawn[3].bfloat16()[1:1004], drawn[4][:1200].view(40, 30).t(), drawn[5].half()[:1000]]
    moved = []
    for tensor in aligned + cut:  # each keeps its alignment and strides
        storage = torch.empty(2104, dtype=tensor.dtype, device=device)
        view = storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        moved.append(view.copy_(tensor))
    return moved, [0, 256, 0, 0, 64, 2**33 + 1]


def updated(module, name, count, dist, device="cpu", **options):
    tensors, offsets = tensors_of(device)
    states = [companions(name, tensor.cpu(), seed=b) for b, tensor in enumerate(tensors)]
    form = place(form_of(name, states, LIMIT * torch.linspace(0.5, 2, len(tensors))), device)
    module.axpy_(
        blocks_of(tensors, offsets),
        seed_tensor(SEEDS[:count], device),
        put(COEFS[:count], device),
        torch.linspace(0.5, 2, len(tensors)).to(device),
        put(0.99, device),
        seed_tensor(7, device),
        dist,
        options.get("stats"),
        form,
    )
    return [tensor.cpu() for tensor in tensors]


@pytest.mark.parametrize("name", FORMS[1:])
@pytest.mark.parametrize("count", (1, 3))
def test_an_update_in_a_form_is_the_references(target, name, count):
    """Signs: equal bits.  Normals: the same update, but for an ulp of theta where a rounding goes the other way."""
    expected = updated(reference, name, count, "rademacher")
    for ours, theirs in zip(updated(target.backend, name, count, "rademacher", target.device), expected, strict=True):
        assert torch.equal(ours, theirs)
    expected = updated(reference, name, count, "normal")
    for ours, theirs in zip(updated(target.backend, name, count, "normal", target.device), expected, strict=True):
        ulp = torch.finfo(ours.dtype).eps * (theirs.float().abs() + 1e-3)
        error = 64 * 0.4 * (4e-5 if target.device.type == "cpu" else 1e-3)  # noise over the root of 2^-12
        assert ((ours.float() - theirs.float()).abs() <= ulp + error).all()
    plain = updated(reference, "plain", count, "normal")
    assert not torch.equal(plain[0], expected[0])


def test_statistics_ride_on_an_update_in_a_form(target):
    stats = stats_of(6, target.device)
    tensors = updated(target.backend, "shifted", 1, "normal", target.device, stats=stats)
    for b, tensor in enumerate(tensors):
        assert torch.allclose(stats.norm[b].cpu(), tensor.float().norm(), rtol=1e-5)


def scratched(module, theta, name, count, dist, *, rows=None, shift=0, mirror=True, above=1.0):
    device = theta.device
    state = companions(name, theta.cpu(), seed=3)
    form = place(form_of(name, state), device)
    if form is not None and form.state is not None and shift:
        storage = torch.empty(theta.numel() + 8, dtype=form.state.dtype, device=device)
        form = form._replace(state=storage[1 : 1 + theta.numel()].view(theta.shape).copy_(form.state))
    shape = theta.shape if rows is None else (len(rows), *theta.shape[1:])
    outs = [torch.empty(shape, dtype=theta.dtype, device=device) for _ in range(1 + mirror)]
    module.scratch(
        theta,
        outs[0],
        outs[1] if mirror else None,
        TENSOR_ID,
        seed_tensor(SEEDS[:count], device),
        put(COEFS[:count], device),
        put([0.5, 2.0, 1.0][:count], device),
        put(above, device),
        None if rows is None else torch.tensor(rows, device=device),
        dist,
        None,
        form,
    )
    return [out.cpu() for out in outs]


CASES = [(name, count, torch.bfloat16, above) for name in FORMS for count, above in ((1, None), (2, 1.0), (3, 1.0))]
CASES += [("weighted", 2, torch.float32, None), ("shifted", 3, torch.float16, 1.0)]


@pytest.mark.parametrize(("name", "count", "dtype", "above"), CASES, ids=str)
def test_a_scratch_of_several_directions_is_the_references(target, name, count, dtype, above):
    theta = (torch.randn((37, 113), generator=torch.Generator().manual_seed(4)) * 0.02).to(dtype)
    there, rows, call = theta.to(target.device), [36, 0, 7], {"above": above}
    expected = scratched(reference, theta, name, count, "rademacher", **call)
    ours = scratched(target.backend, there, name, count, "rademacher", **call)
    assert all(map(torch.equal, ours, expected))
    some = scratched(target.backend, there, name, count, "rademacher", rows=rows, shift=count % 2, **call)
    assert all(torch.equal(a, b[rows]) for a, b in zip(some, expected, strict=True))
    alone = scratched(target.backend, there, name, count, "rademacher", mirror=False, **call)
    assert torch.equal(alone[0], expected[0]) and torch.equal(there.cpu(), theta)


@pytest.mark.parametrize("dist", ("normal", "rademacher"))
def test_noise_of_the_low_rank_stream(target, dist):
    for stream in (2, 3):
        found = []
        for module, device in ((target.backend, target.device), (reference, "cpu")):
            out = torch.empty(1003, device=device)
            module.noise(out, seed_tensor(SEEDS[1], device), TENSOR_ID, 2**33 + 5, dist, stream)
            found.append(out.cpu())
        ours, theirs = found
        worst = 0.0 if dist == "rademacher" else triton_target.worst_normal(target)
        assert (ours - theirs).abs().max() <= worst
