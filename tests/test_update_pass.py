"""An update as one pass over the weights, and the phases of a step as a profiler sees them."""

from __future__ import annotations

import pytest
import torch
from test_engine import EPS, Quadratic

from zo_finetuner.engine import Engine
from zo_finetuner.optim import MeZO, make_method
from zo_finetuner.optim.base import Direction
from zo_finetuner.params import trainable_blocks
from zo_finetuner.update import apply_terms
from zo_kernels import draw_noise, seed_tensor, update_

DECAY = torch.tensor(0.95)


def test_terms_with_their_own_scales_share_one_pass():
    model = Quadratic()
    blocks = trainable_blocks(model)
    scales = [torch.tensor([0.5, 2.0]), None, torch.tensor([1.5, 0.1])]
    directions = [Direction(seed_tensor(seed), scale) for seed, scale in enumerate(scales, start=1)]
    terms = [(direction, torch.tensor(0.1 * k)) for k, direction in enumerate(directions, start=1)]
    want = [tensor.detach().double() * DECAY.double() for tensor in blocks.tensors]
    for direction, coef in terms:
        for b, (name, block) in enumerate(zip(blocks.names, want, strict=True)):
            z = draw_noise(tuple(block.shape), direction.seed, blocks.ids[blocks.index[name]])
            block += coef * (1 if direction.scale is None else direction.scale[b]) * z.double()
    apply_terms(blocks, terms, DECAY, seed_tensor(1))
    for ours, theirs in zip(blocks.tensors, want, strict=True):
        assert (ours - theirs).abs().max() < 5 * 2**-24 * 4  # four roundings of values below 4
    with pytest.raises(ValueError, match="share one distribution"):
        apply_terms(blocks, [*terms, (Direction(seed_tensor(9), dist="rademacher"), DECAY)], None, seed_tensor(1))


def test_the_way_back_shares_the_updates_pass_under_weight_decay(monkeypatch):
    """In place: decay * (theta - eps z) + (decay * eps - lr g) z.  Three passes over the weights, none of its own for
    the way back, and the weights of a scratch run but for rounding."""
    import zo_finetuner.update as update

    passes, weights = [], {}
    monkeypatch.setattr(update, "update_", lambda *a, **k: (passes.append(1), update_(*a, **k)))
    for mode in ("scratch", "inplace"):
        passes.clear()
        model = Quadratic()
        engine = Engine(model, MeZO(), eps=EPS, weight_decay=0.5, probing=mode)
        for _ in range(3):
            engine.step(model, 0.1)
        weights[mode] = model.theta().detach()
    assert len(passes) == 3 * 3  # there, to the other side, back and updated
    # A weight below 4 moved in place is off by 2^-23 at most, the loss by that times the gradient, g by that over eps.
    error = 2.0**-23 * Quadratic().gradient().abs().sum() / EPS
    largest = 4.0  # of 57 normals
    assert (weights["inplace"] - weights["scratch"]).abs().max() < 3 * 0.1 * error * largest
    assert (weights["scratch"] - Quadratic().theta()).abs().max() > 0.1


@pytest.mark.parametrize(
    "name, settings, passes",
    [
        ("mezo", {"probes": 3}, 2 * 3 + 1),
        ("fzoo", {"probes": 3}, 3 + 1),  # the centre is met before the first is displaced
        ("zo-momentum", {}, 2 + 1),  # and the pass that updates the state, which is another op
        ("mezo-gv", {}, 2 + 2 + 1),
        ("ldsd-adamm", {"candidates": 3}, 4 + 2),  # and the mean's
    ],
)
def test_in_place_a_way_back_and_the_next_way_are_one_pass(name, settings, passes, monkeypatch):
    import zo_finetuner.update as update

    made = []
    monkeypatch.setattr(update, "update_", lambda *a, **k: (made.append(1), update_(*a, **k)))
    model = Quadratic()
    Engine(model, make_method(name, model, settings=settings), eps=EPS, probing="inplace").step(model, 1e-3)
    assert len(made) == passes


def test_a_profiler_sees_the_phases_of_a_step():
    model = Quadratic()
    engine = Engine(model, MeZO(), eps=EPS)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        engine.step(model, 0.1)
    seen = [e.name for e in sorted(profile.events(), key=lambda e: e.time_range.start) if e.name.startswith("zo.")]
    assert seen == ["zo.ask", "zo.probe", "zo.forward", "zo.probe", "zo.forward", "zo.tell", "zo.update"]
