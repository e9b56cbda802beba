"""Parts of methods: what goes with what, what does not and why, and what estimates are worth whatever the rule."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from every_method import engine_of, flat
from models import tiny, tokens
from problems import EPS, Problem

from zo_finetuner.engine import Engine
from zo_finetuner.errors import InputError
from zo_finetuner.optim import PRESETS, Composed, make_method
from zo_finetuner.optim.rules import RULES
from zo_finetuner.optim.settings import PARTS, build, settings_of
from zo_finetuner.params import trainable_blocks
from zo_finetuner.pertnn import PertNN

UNBIASED = {
    # estimator's settings: (squared error of an estimate over the squared gradient, of d weights)
    "central": ({}, lambda d: d + 1),
    "central, 3": ({"probes": 3}, lambda d: (d + 1) / 3),
    "central, signs": ({"dist": "rademacher"}, lambda d: d - 1),
    "one-sided": ({"estimator": "one-sided", "probes": 4}, lambda d: (d + 1) / 4),
    "leave-one-out": ({"estimator": "one-sided", "probes": 4, "baseline": "mean"}, lambda d: (d + 1) / 3),
    "slope": ({"estimator": "slope"}, lambda d: d + 1),
    "slope, 2, signs": ({"estimator": "slope", "probes": 2, "dist": "rademacher"}, lambda d: (d - 1) / 2),
}


@pytest.mark.parametrize("curvature", [0.0, 1.0], ids=["linear", "quadratic"])
@pytest.mark.parametrize("name", UNBIASED)
def test_estimates_are_unbiased_with_the_variance_of_the_theory(name, curvature):
    """z-test of each of 45 coordinates over 600 steps, and the squared error to 15 % (it is a mean of chi-squares, each
    of relative spread about 1.4, so its standard error is 6 %) of a linear loss, where the theory is exact."""
    settings, variance = UNBIASED[name]
    model, samples = Problem(curvature), []
    engine = Engine(model, build("mezo", Composed, {}, settings), eps=EPS, seed=1, probing="inplace")
    gradient, start = model.gradient(), [p.detach().clone() for p in model.parameters()]
    for _ in range(600):
        before = flat(engine)
        model.seen.clear()
        engine.step(model, 1e-2)
        samples.append((before - flat(engine)) / 1e-2)
        for p, q in zip(model.parameters(), start, strict=True):
            p.data.copy_(q)
    samples = torch.stack(samples)
    z = (samples.mean(0) - gradient) / (samples.std(0) / math.sqrt(len(samples)))
    assert z.abs().max() < 4.2  # 45 coordinates: P(|z| > 4.2) is 1.2e-3 in all
    error = (samples - gradient).square().sum(1).mean() / gradient.square().sum()
    if curvature and "one" in name:  # a curvature is noise to one side
        return
    assert error.item() == pytest.approx(variance(45), rel=0.15)


def test_learned_scales_go_with_other_rules_and_estimators():
    """Momentum without memory on learned scales is the learned optimizer; other estimators feed back a mean loss."""
    ids, ends = tokens(), []
    for name, settings in (("zo-finetuner", {}), ("zo-momentum", {"beta": 0.0})):
        model = tiny("llama")
        nets = PertNN.fresh(trainable_blocks(model).names, seed=1)
        engine = Engine(model, make_method(name, model, pertnn=nets, settings=settings), eps=1e-2, seed=2)
        for _ in range(3):
            engine.step(lambda model=model: model(input_ids=ids, labels=ids).loss, 1e-3)
        assert 0 < engine.metrics()["scale_min"] < engine.metrics()["scale_max"]
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (ends[0] - ends[1]).abs().max() < 5e-6
    for name, settings in (("es", {"probes": 3}), ("ldsd-sgd", {"candidates": 3}), ("zo-conservative", {})):
        model, seen = tiny("llama"), []
        chosen = make_method(name, model, pertnn=nets, settings=settings)
        engine = Engine(model, chosen, eps=1e-2)

        def loss(model=model, seen=seen):
            seen.append(model(input_ids=ids, labels=ids).loss)
            return seen[-1]

        step = engine.step(loss, 1e-3)
        fed = {"es": [step, step], "ldsd-sgd": [min(seen[:3]), seen[-1]], "zo-conservative": seen[1:3]}[name]
        assert chosen.scales.history.losses.tolist() == [float(value) for value in fed]


REFUSED = [
    ("fzoo", {"probes": 1}, "probes must be at least 2, got 1: the losses of one probe have no spread"),
    ("es", {"probes": "1"}, "probes must be at least 2, got 1: the baseline of a probe is the mean of the others"),
    ("ldsd-sgd", {"candidates": 1}, "candidates must be at least 2, got 1"),
    ("mezo-gv", {"probes": 1}, "the best of one candidate is no choice"),
    ("bszo", {"samples": 7}, "samples must be between probes .2. and twice that, got 7"),
    ("mezo", {"probes": 0}, "probes must be at least 1"),
    ("sparse-mezo", {"sparsity": 1.0}, "1 leaves nothing to train"),
    ("zo-adam", {"bta1": 0.5}, 'zo-adam has no setting "bta1" .did you mean "beta1"'),
    ("zo-adam", {"beta1": "fast"}, "setting beta1 must be a number, got 'fast'"),
    ("zo-adam", {"beta1": 1.0}, "beta1 must be at least 0 and below 1"),
    ("mezo", {"rule": "adams"}, 'unknown rule "adams" .did you mean "adam"'),
    ("mezo", {"beta": 0.5}, 'mezo has no setting "beta"'),
    ("zo-conservative", {"rule": "adam"}, "zo-conservative goes with the rule sgd alone: it tries the very points"),
    ("zo-conservative", {"probes": 2}, "probes must be 1, got 2: the points that are tried lie on one line"),
    ("hizoo", {"subset": "small"}, "hizoo takes no subset: its curvature already scales every weight"),
    ("ldsd-sgd", {"subset": "small"}, "ldsd-sgd takes no subset: its mean is one of all weights"),
    ("hizoo", {"rule": "adam"}, "hizoo takes no rule: its curvature is updated in the pass"),
    ("hizoo", {"alpha": -1}, "alpha must be at least 0"),
    ("ldsd-sgd", {"estimator": "central"}, "takes no estimator: the mean is learned from its own candidates"),
    ("ldsd-sgd", {"mean_dtype": "bfloat"}, 'did you mean "bfloat16"'),
    ("ldsd-sgd", {"std": 0}, "std must be positive"),
    ("fzoo", {"baseline": "median"}, 'baseline must be "center" or "mean"'),
    ("dizo", {"tau": 2}, "tau must be between 0 and 1"),
    ("zo-sign", {"sign": "vector"}, 'sign must be "scalar" or "elementwise"'),
    ("mezo", {"dist": "cauchy"}, "dist must be normal or rademacher"),
]


@pytest.mark.parametrize("name, settings, message", REFUSED)
def test_what_cannot_work_is_told(name, settings, message):
    with pytest.raises(InputError, match=message):
        make_method(name, Problem(), settings=settings)


def test_every_kind_says_why_it_has_no_choice_of_a_part():
    for preset in PRESETS.values():
        fields = {field.name for field in dataclasses.fields(preset.kind)}
        assert {*PARTS, "scales"} <= fields | preset.kind.fixed.keys(), preset.kind


@pytest.mark.parametrize(
    "name, part, choice, left",
    [("es", "estimator", "central", 1), ("fzoo", "estimator", "bayesian", 2), ("mezo", "estimator", "one-sided", 8)],
)
def test_a_part_that_is_chosen_away_takes_its_settings_along(name, part, choice, left):
    assert make_method(name, Problem(), settings={part: choice}).directions == left
    kept = make_method(name, Problem(), settings={part: choice, "probes": 3, "samples": 3}
                       if choice == "bayesian" else {part: choice, "probes": 3})  # fmt: skip
    assert kept.directions == 3


def test_what_does_not_go_with_the_model_is_told(monkeypatch):
    with pytest.raises(InputError, match='no trainable tensor has "k_proj,v_proj" in its name .* --set project='):
        make_method("dizo", tiny("gpt2"))
    model = Problem()
    with pytest.raises(InputError, match="sparsity 0.99 leaves none of the 20 weights of embed"):
        make_method("sparse-mezo", model, settings={"sparsity": 0.99})
    model.k_proj.data.zero_()
    with pytest.raises(InputError, match="k_proj: its smallest weights are exactly zero"):
        make_method("sparse-mezo", model)
    import zo_finetuner.optim.state as state

    monkeypatch.setattr(state, "free_bytes", lambda device: 45 * 4 * 2)
    make_method("zo-adam", model)
    with pytest.raises(InputError, match="the state of adamm .m, v, vmax. needs .* GiB, and .* are free"):
        make_method("zo-adamm", model)
    with pytest.raises(InputError, match="hizoo has no nets: its curvature is the scale of every weight"):
        make_method("hizoo", model, pertnn="x.safetensors")


def test_another_runs_state_is_refused():
    saved = engine_of("zo-adam").state_dict()
    engine = Engine(Problem(), build("zo-adam", Composed, {}, {"rule": "momentum"}), probing="scratch")
    with pytest.raises(InputError, match="this one keeps rule.m: give the run's settings"):
        engine.load_state_dict(saved)


def test_settings_of_a_composition_have_names_of_their_own():
    """A setting must not fall to two parts at once."""
    for estimator in PARTS["estimator"].values():
        for rule in RULES.values():
            for subset in PARTS["subset"].values():
                names = [n for owner in (Composed, estimator, rule, subset) for n in settings_of(owner)]
                assert len(names) == len(set(names)), names
