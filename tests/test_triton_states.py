"""`update_state_` of the Triton backend against the reference: rules, odd tensors, forms, steps that are not kept."""

from __future__ import annotations

import pytest
import torch
import triton_target
from test_forms import LIMIT, companions, form_of
from test_states import RULES, numbers, states_of
from test_triton_forms import COEFS, place, tensors_of
from triton_target import SEEDS, blocks_of, put

from zo_kernels.backends import reference
from zo_kernels.ops import seed_tensor
from zo_kernels.triton_kernels.table import KEPT, addresses_of

interpreted, target = triton_target.interpreted, triton_target.target  # fixtures


def stepped(module, rule, count, dist, device="cpu", *, name="plain", keep=None, scales=1, shift=0, rounding=7):
    """theta and the states after a step, on the CPU.  shift: elements by which states miss their 16-byte boundary."""
    tensors, offsets = tensors_of(device)
    states = []
    for of_blocks in states_of(rule, [tensor.cpu() for tensor in tensors]):
        states.append([])
        for state in of_blocks:
            storage = torch.empty(state.numel() + shift, device=device)
            states[-1].append(storage[shift:].view(state.shape).copy_(state))
    companion = [companions(name, tensor.cpu(), seed=b) for b, tensor in enumerate(tensors)]
    scale = torch.linspace(0.5, 2, scales * len(tensors)).view(scales, len(tensors)).squeeze(0)
    n = numbers(rule)
    module.update_state_(
        blocks_of(tensors, offsets),
        rule,
        states,
        seed_tensor(SEEDS[:count], device),
        put(COEFS[:count], device),
        scale.to(device),
        (n[: 1 + count] if rule == "shifted-mean" else n).to(device),
        place(form_of(name, companion, LIMIT.repeat(len(tensors))), device),
        put(0.99, device),
        None if rounding is None else seed_tensor(rounding, device),
        None if keep is None else torch.tensor(keep, device=device),
        dist,
    )
    return [tensor.cpu() for tensor in [*tensors, *(s for state in states for s in state)]]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("count", "scales"), [(1, 1), (3, 3)])
def test_a_rule_is_the_references(target, rule, count, scales):
    """Signs: equal bits of weights and states."""
    expected = stepped(reference, rule, count, "rademacher", scales=scales)
    ours = stepped(target.backend, rule, count, "rademacher", target.device, scales=scales)
    assert all(map(torch.equal, ours, expected))
    assert not any(torch.equal(a, b) for a, b in zip(expected[:2], tensors_of()[0], strict=False))


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_with_normals_is_the_references_to_the_noises_error(target, rule):
    expected = stepped(reference, rule, 1, "normal", rounding=None)
    ours = stepped(target.backend, rule, 1, "normal", target.device, rounding=None)
    error = 4e-2 * triton_target.worst_normal(target) + 1e-6  # steps up to 0.02; a root of h below 0.1 divides
    count = len(tensors_of()[0])
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        difference = (a.float() - b.float()).abs()
        if i < count:
            off = difference > 10 * error + torch.finfo(a.dtype).eps * (b.float().abs() + 1e-3)
            assert off.float().mean() <= (0.01 if rule.startswith("sign") else 0)  # a sign that flips near zero
        else:
            assert (difference <= error + 1e-6 * b.abs()).all()


@pytest.mark.parametrize("name", ("weighted", "below", "shifted"))
def test_a_gradient_in_a_form(target, name):
    expected = stepped(reference, "adam", 2, "rademacher", name=name)
    ours = stepped(target.backend, "adam", 2, "rademacher", target.device, name=name)
    assert all(map(torch.equal, ours, expected))


@pytest.mark.parametrize("rule", RULES)
def test_a_step_that_is_not_kept_leaves_every_bit(target, rule):
    before = tensors_of()[0]
    before += [state for of_blocks in states_of(rule, before) for state in of_blocks]
    ours = stepped(target.backend, rule, 1, "normal", target.device, keep=False)
    assert all(map(torch.equal, ours, before))
    kept = stepped(target.backend, rule, 1, "normal", target.device, keep=True)
    assert all(map(torch.equal, kept, stepped(target.backend, rule, 1, "normal", target.device)))


@pytest.mark.parametrize("rule", ("adam", "shifted-mean"))
def test_all_layouts_give_the_same_bits(target, monkeypatch, rule):
    """Tile and chunk size, states off their 16-byte boundary."""
    expected = stepped(target.backend, rule, 1, "normal", target.device)
    assert all(map(torch.equal, stepped(target.backend, rule, 1, "normal", target.device, shift=1), expected))
    monkeypatch.setattr(target.backend.launch, "STATE_BLOCK", 512)
    monkeypatch.setattr(target.backend.launch, "CHUNK", 1024)
    assert all(map(torch.equal, stepped(target.backend, rule, 1, "normal", target.device), expected))


def test_the_addresses_of_states_are_tables_built_once():
    tensors, offsets = tensors_of()
    blocks, states = blocks_of(tensors, offsets), [[torch.zeros(t.shape) for t in tensors] for _ in range(2)]
    first, aligned = addresses_of(blocks, states)
    assert first.tolist() == [[s.data_ptr() for s in of_blocks] for of_blocks in states] and aligned
    assert addresses_of(blocks, states)[0] is first
    for _ in range(2 * KEPT):
        states.append([torch.zeros(t.shape) for t in tensors])
        addresses_of(blocks, states)
    assert len(blocks.triton_state_tables) == KEPT
