"""The guard between losses and weights: each rule at its boundary, on every probing, and the run that has to stop."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from every_method import METHOD, engine_of, flat, kept, same
from problems import Problem

from zo_finetuner.engine import Engine
from zo_finetuner.errors import InputError, UnstableRun
from zo_finetuner.guards import Limits
from zo_finetuner.optim import MeZO
from zo_finetuner.optim.composed import Composed
from zo_finetuner.optim.settings import build
from zo_finetuner.optimizer import create_zo_optimizer

EPS, LR = 0.1, 0.02


def given(engine, pairs, lr=LR):
    """Steps on losses that are given, two a step; the weights after each."""
    weights = []
    for pair in pairs:
        values = iter(pair)
        engine.step(lambda values=values: next(values), lr)
        weights.append(flat(engine))
    return weights


def counts(engine):
    return [int(value) for value in engine.guard.counts]


@pytest.mark.parametrize("probing", ["scratch", "inplace"])
def test_an_exploded_loss_skips_the_step_and_says_so(probing, caplog):
    engine = Engine(Problem(), MeZO(), eps=EPS, probing=probing, weight_decay=0.1)
    given(engine, [(2.0, 300.0)], lr=1e-6)  # before the first step there is no mean
    given(engine, [(2.0, 3.0)] * 201, lr=1e-6)
    assert counts(engine) == [0, 0, 0, 0]
    mean = float(engine.guard.level / engine.guard.taken)
    assert mean == pytest.approx(3 + 297 * 0.98**201 / 50 / (1 - 0.98**202))  # 3.10
    before = flat(engine)
    assert not torch.equal(given(engine, [(2.0, 9.9 * mean)])[0], before)
    mean, before = float(engine.guard.level / engine.guard.taken), flat(engine)
    with caplog.at_level("WARNING"):
        (after, _) = given(engine, [(2.0, 10.1 * mean), (2.0, 2.1)])
    assert (after - before).abs().max() <= (0 if probing == "scratch" else 2**-19)  # numbers below 16
    assert counts(engine) == [1, 1, 0, 0] and engine.metrics()["exploded_steps"] == 1
    assert "step 203 was skipped: a loss exploded (1 so far)" in caplog.text


@pytest.mark.parametrize("losses, skipped", [((0.001, 9.9), 0), ((0.001, 10.1), 1), ((-30.0, -60.0), 0)])
def test_small_and_negative_losses_explode_above_ten(losses, skipped):
    """Below 1 the mean counts as 1: a batch with a loss of 2 among losses of .001 is no explosion."""
    engine = Engine(Problem(), MeZO(), eps=EPS)
    given(engine, [(0.001, 0.002)] * 3 + [losses])
    assert counts(engine)[0] == skipped


def test_no_explosion_without_the_rule():
    engine = Engine(Problem(), MeZO(), eps=EPS, limits=Limits(explosion=0))
    given(engine, [(1.0, 2.0), (1.0, 1e6)])
    assert counts(engine) == [0, 0, 0, 0]


@pytest.mark.parametrize("probing", ["scratch", "inplace"])
def test_a_clipped_step_is_one_with_the_bound_for_g(probing):
    """g = (l+ - l-) / 2 eps: of 5 and 1 it is 20, clipped to 8 what 2.6 and 1 give."""
    ends = []
    for clip, pair in ((8.0, (5.0, 1.0)), (0.0, (2.6, 1.0)), (8.0, (2.59, 1.0)), (0.0, (2.59, 1.0))):
        engine = Engine(Problem(), MeZO(), eps=EPS, probing=probing, limits=Limits(clip=clip))
        ends.append((given(engine, [pair])[0], counts(engine)[2]))
    assert (ends[0][0] - ends[1][0]).abs().max() < 2e-6 and ends[0][1] == 1
    assert torch.equal(ends[2][0], ends[3][0]) and ends[2][1] == 0  # below the bound no bit differs


def test_a_clip_is_of_the_norm_of_several():
    """Four one-sided probes: |(g_1 .. g_4)| is bounded, their ratios are kept."""
    moves = []
    for limits in (Limits(), Limits(clip=1.0)):
        method = build("mezo", Composed, {}, {"estimator": "one-sided", "probes": "4"})
        model = Problem()
        before = model.theta().detach().clone()
        engine = Engine(model, method, eps=EPS, limits=limits)
        losses = iter([1.0, 1.5, 3.0, 0.5, 2.0])
        engine.step(lambda losses=losses: next(losses), LR)
        moves.append((flat(engine) - before, float(engine.projected_grad)))
    (free, size), (bound, same_size) = moves
    assert size == same_size > 1
    assert (bound * size - free).abs().max() < 1e-5


@METHOD
def test_equal_losses_move_nothing_in_any_method(case):
    """Zero spread: no method divides by it; the steps are counted as flat."""
    engine = engine_of(case)
    if engine.method.slopes:
        pytest.skip("a derivative is no difference of losses")
    before = flat(engine)
    for _ in range(3):
        engine.step(lambda: 1.25, LR)
    after = flat(engine)
    assert torch.isfinite(after).all()
    assert not any(t.isnan().any() for v in kept(engine).values() for t in (v if isinstance(v, list) else [v]))
    assert counts(engine) == [0, 0, 0, 3]
    assert (after - before).abs().max() < 1e-5


@METHOD
@pytest.mark.parametrize("bad", [math.nan, 1e5], ids=["nan", "explosion"])
def test_a_skipped_step_leaves_every_method_as_it_was(case, bad):
    engine = engine_of(case)
    run = itertools.count()

    def loss():
        return engine.model() if engine.method.slopes else engine.model() + 30.0

    for _ in range(2):
        engine.step(loss, LR)
    before, state = flat(engine), kept(engine)
    engine.step(lambda: loss() * (bad if next(run) == 0 else 1.0), LR)
    if not (bad == 1e5 and engine.method.slopes and counts(engine)[0] == 0):
        assert counts(engine)[0] == 1
        assert torch.equal(flat(engine), before) and same(kept(engine), state)


def test_fp16_weights_do_not_overflow():
    """A step of lr |g| 6.76 > 32,752 could leave fp16; bf16 has room."""
    for dtype, skipped in ((torch.float16, 1), (torch.bfloat16, 0)):
        model = Problem().to(dtype)
        engine = Engine(model, MeZO(), eps=1e-3, limits=Limits(explosion=0))
        given(engine, [(9000.0, 0.0)], lr=1e-2)  # g = 4.5e6
        assert counts(engine)[0] == skipped
        assert torch.isfinite(flat(engine)).all()


def test_a_gradient_beyond_fp32_is_skipped():
    engine = Engine(Problem(), MeZO(), eps=EPS, probing="scratch", limits=Limits(explosion=0))
    before = flat(engine)
    given(engine, [(3e38, -3e38)])  # finite losses, an infinite difference
    assert counts(engine)[0] == 1 and torch.equal(flat(engine), before)


def test_a_run_that_skips_too_much_stops_with_a_reason_and_can_go_on():
    engine = Engine(Problem(), MeZO(), eps=EPS, probing="scratch")
    before = flat(engine)
    with pytest.raises(UnstableRun, match=r"stopped before step 35: more than 50% .* \(35 in all, 0 of them"):
        given(engine, [(math.nan, 1.0)] * 60)
    assert engine.step_count == 35 and torch.equal(flat(engine), before)
    again = Engine(Problem(), MeZO(), eps=EPS, probing="scratch")
    again.load_state_dict(engine.state_dict())
    given(again, [(1.0, 2.0)] * 2)
    assert counts(again)[0] == 35 and again.step_count == 37


def test_few_bad_steps_do_not_stop_a_run():
    engine = Engine(Problem(), MeZO(), eps=EPS)
    given(engine, [(1.0, math.nan if step % 3 == 0 else 2.0) for step in range(120)], lr=1e-6)
    assert counts(engine)[0] == 40
    engine = Engine(Problem(), MeZO(), eps=EPS, limits=Limits(max_skipped=1.0))
    given(engine, [(math.nan, 1.0)] * 120)
    assert engine.step_count == 120


def test_what_the_guard_knows_is_resumed():
    whole, part = (Engine(Problem(), MeZO(), eps=EPS) for _ in range(2))
    losses = [(1.0, 2.0), (3.0, 4.0), (math.nan, 1.0), (2.0, 90.0), (1.0, 20.0)]
    ends = given(whole, losses)
    given(part, losses[:3])
    resumed = Engine(Problem(), MeZO(), eps=EPS)
    resumed.load_state_dict(part.state_dict())
    for tensor, other in zip(resumed.blocks.tensors, part.blocks.tensors, strict=True):
        tensor.copy_(other)
    assert torch.equal(given(resumed, losses[3:])[-1], ends[-1])
    assert torch.equal(resumed.guard.state, whole.guard.state)


@pytest.mark.parametrize("name", ["clip", "explosion", "max_skipped"])
def test_limits_are_checked(name):
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match=f"{name} must be zero or positive"):
            Limits(**{name: value})


def test_the_optimizer_takes_limits():
    optimizer = create_zo_optimizer(Problem(), "mezo", lr=LR, eps=EPS, limits=Limits(clip=1.0))
    values = iter([9.0, 1.0])
    optimizer.step(lambda: next(values))
    assert counts(optimizer.engine) == [0, 0, 1, 0]
