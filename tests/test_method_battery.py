"""What holds for every method, whatever its equations: one battery, over all of them and some compositions."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from models import tiny, tokens
from problems import EPS, LR, SEED, Problem, run
from test_hf import Rows, arguments

from zo_finetuner.engine import Engine
from zo_finetuner.errors import InputError
from zo_finetuner.hf import ZOTrainer
from zo_finetuner.optim import METHODS, PRESETS, Composed, make_method
from zo_finetuner.optim.rules import RULES
from zo_finetuner.optim.scales import Asked
from zo_finetuner.optim.self_calibrated import Calibrated, calibrated_scales
from zo_finetuner.optim.settings import PARTS, build, settings_of
from zo_finetuner.params import trainable_blocks
from zo_finetuner.pertnn import PertNN
from zo_kernels import Blocks, derive_seed, dot_noise, draw_noise, seed_tensor, tensor_ids, use_backend

# Every name, sized for tests; then compositions.
CASES = {name: (name, {}) for name in METHODS if name not in ("zo-finetuner", "sigma-one", "closed-form")}
CASES["es"] = ("es", {"probes": 4})
CASES["fzoo"] = ("fzoo", {"probes": 4})
CASES["ldsd-jaguar"] = ("ldsd-jaguar", {"beta": 0.5})
CASES["hizoo"] = ("hizoo", {"alpha": 1e-4})
CASES["subzero"] = ("subzero", {"rank": 2})
CASES["dizo"] = ("dizo", {"period": 2, "rounds": 2, "project": "k_proj"})
CASES |= {
    "central 3, adam": ("zo-adam", {"probes": 3}),
    "one-sided, momentum, signs": ("zo-momentum", {"estimator": "one-sided", "probes": 3, "dist": "rademacher"}),
    "leave-one-out, normalized": ("es", {"probes": 3, "spread": False, "rule": "normalized"}),
    "elementwise sign": ("zo-sign", {"sign": "elementwise"}),
    "masked, adamm": ("sparse-mezo", {"rule": "adamm"}),
    "masked, conservative": ("zo-conservative", {"subset": "small"}),
    "greedy": ("mezo-gv", {"greedy": True, "probes": 3}),
    "ldsd bf16 mean": ("ldsd-sgd", {"mean_dtype": "bfloat16"}),
    "ldsd momentum": ("ldsd-sgd", {"rule": "momentum", "candidates": 3}),
}
METHOD = pytest.mark.parametrize("case", CASES)


def method(case, **more):
    name, settings = CASES[case]
    return build(name, PRESETS[name].kind, PRESETS[name].settings, {**settings, **more})


def engine_of(case, probing="scratch", seed=SEED, model=None, grouped=False, **more):
    chosen, model = method(case, **more), Problem() if model is None else model
    if chosen.name == "self-calibrated":
        chosen.scales = calibrated_scales(model, Asked(chosen)) if grouped else one_group(model)
    return Engine(model, chosen, eps=EPS, seed=seed, probing="auto" if chosen.low_rank else probing)


def one_group(model):
    """All blocks in one group, so that a step moves them all; a group a step is tested in test_self_calibrated."""
    numels = [p.numel() for p in model.parameters() if p.requires_grad]
    total = torch.tensor([sum(numels)], dtype=torch.float64)
    return Calibrated(torch.zeros(len(numels), dtype=torch.int64), total, total.clone())


def flat(engine):
    engine.flush()  # low-rank updates are collected
    return engine.model.theta().detach().clone()


def copied(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    return [copied(v) for v in value] if isinstance(value, list) else value


def kept(engine):
    return {name: copied(value) for name, value in engine.method.state_dict().items()}


def same(a, b):
    pairs = [(x, y) for n in a for x, y in (zip(a[n], b[n], strict=True) if isinstance(a[n], list) else [(a[n], b[n])])]
    return all(torch.equal(x, y) for x, y in pairs)


@METHOD
def test_an_update_goes_the_way_its_probes_went(case):
    """The change of a first step lies in the span of the displacements that the closure has met, and is made of the
    very noise of the step's seeds; of rules that take each coordinate by itself, the signs are those of the span."""
    engine = engine_of(case)
    before = flat(engine)
    run(engine, lr=1.0 if case == "bszo" else 1e-3)  # BSZO's prior shrinks a step of few weights to nothing
    change = flat(engine) - before
    signs = isinstance(engine.method, Composed) and type(engine.method.rule).__name__ in ("Adam", "AdaMM")
    signs |= case in ("elementwise sign", "ldsd-adamm", "ldsd-jaguar")
    if case == "forward-grad":  # it met theta alone
        ways = noise(derive_seed(SEED, 0, 0))[:, None]
    else:
        ways = torch.stack([seen - before for seen in engine.model.seen], 1)
    if not signs:
        # A weight near 1 is rounded by 6e-8, a change is some 1e-3; HiZOO's h has moved by alpha c z^2 h in between.
        error = 1e-2 if case == "hizoo" else 1e-3
        left = change - ways @ torch.linalg.lstsq(ways, change, driver="gelsd").solution
        assert left.norm() < error * change.norm()
    elif ways.shape[1] == 2:
        cosine = change.sign() @ ways[:, 0].sign() / ways[:, 0].count_nonzero()
        assert cosine.abs() == 1
    assert change.norm() > 1e-5
    if engine.method.directions == 1 and not signs and "mask" not in case and case != "sparse-mezo":
        start, blocks = Problem(), engine.blocks
        moved = [p - q.detach() for p, q in zip(blocks.tensors, start.parameters(), strict=True)]
        moved = Blocks(zip(blocks.names, moved, strict=True))
        dots = dot_noise(moved, engine.inputs.seeds[0].reshape(1), dist=engine.method.dist).sum()
        z = noise(derive_seed(SEED, 0, 0), engine.method.dist)
        cosine = dots.abs() / (change.norm() * z.norm())
        assert cosine.item() == pytest.approx(1, abs=1e-2 if case == "hizoo" else 1e-5)


def noise(seed, dist="normal"):
    ids = tensor_ids(name for name, _ in Problem().named_parameters())
    parts = [draw_noise(tuple(p.shape), seed_tensor(seed), ids[n], dist=dist) for n, p in Problem().named_parameters()]
    return torch.cat([part.flatten() for part in parts]).double()


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


@pytest.mark.parametrize("name", UNBIASED)
def test_estimates_are_unbiased_with_the_variance_of_the_theory(name):
    """z-test of each of 45 coordinates over 600 steps, and the squared error to 15 % (it is a mean of chi-squares, each
    of relative spread about 1.4, so its standard error is 6 %)."""
    settings, variance = UNBIASED[name]
    model, samples = Problem(curvature=0.0), []  # linear, where the theory is exact
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
    assert error.item() == pytest.approx(variance(45), rel=0.15)


@METHOD
def test_all_probings_agree(case):
    """In place a step's probes are those of a scratch to rounding, through any order of directions."""
    ends = {}
    if method(case).low_rank:  # `copied` is the dense form of its probes: tests/test_lowrank_probing.py
        for mode in ("scratch", "inplace", "paired"):
            with pytest.raises(InputError, match="leave probing auto"):
                Engine(Problem(), method(case), probing=mode)
        return
    for mode in ("scratch", "inplace", "paired"):
        if mode == "inplace" and method(case).scratch_only:
            with pytest.raises(InputError, match="use --probing scratch"):
                engine_of(case, mode)
            continue
        engine = engine_of(case, mode)
        run(engine, 3, lr=1e-3)
        ends[mode] = flat(engine)
    assert torch.equal(ends["paired"], ends["scratch"])
    if "inplace" in ends:
        # A weight moved in place is off by 1e-7, a loss near 20 by 2e-6, g by 1e-5: 1e-3 of steps of that; bf16 means
        # and rules that take signs pass on more.
        assert (ends["inplace"] - ends["scratch"]).abs().max() < 5e-5


@METHOD
def test_reference_and_cpu_agree(case):
    """Random signs are bit-equal on all backends, so all that is made of them is."""
    ends = []
    for backend in ("reference", "cpu"):
        with use_backend(backend):
            engine = engine_of(case, dist="rademacher")
            run(engine, 3)
            ends.append((flat(engine), kept(engine)))
    if case == "dizo" or method(case).low_rank:  # draws normals, for its factors and for its subspaces
        assert (ends[0][0] - ends[1][0]).abs().max() < 1e-6
    else:
        assert torch.equal(ends[0][0], ends[1][0]) and same(ends[0][1], ends[1][1])


@METHOD
def test_a_resumed_run_is_the_uninterrupted_one(case, tmp_path):
    whole = engine_of(case)
    run(whole, 3), flat(whole)  # to save is to merge what is collected
    run(whole, 2)
    first = engine_of(case)
    run(first, 3)
    torch.save({"model": first.model.state_dict(), "engine": first.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second = engine_of(case, seed=0)
    second.model.load_state_dict(saved["model"])
    second.load_state_dict(saved["engine"])
    run(second, 2)
    assert torch.equal(flat(second), flat(whole)) and same(kept(second), kept(whole))


@METHOD
def test_equal_losses_leave_weights_alone(case):
    """Ties, zero spread, zero gradient: no direction is better than another."""
    engine = engine_of(case)
    before = flat(engine)
    for _ in range(3):
        engine.step(lambda: engine.model() * 0 + 15.0, LR)  # losses here are about 20: no explosion follows
    assert torch.equal(flat(engine), before)
    assert engine.metrics()["skipped_steps"] == 0
    run(engine)
    assert torch.isfinite(flat(engine)).all() and (case == "dizo" or not torch.equal(flat(engine), before))


@METHOD
def test_a_loss_that_is_not_finite_leaves_no_trace(case):
    """Whichever of a step's losses it is: weights, states and memory keep their bits, and the run goes on."""
    engine = engine_of(case)
    run(engine, 1)
    losses = engine.method.forwards if case != "forward-grad" else 1
    for bad in range(min(losses, 6)):
        before, memory, count = flat(engine), kept(engine), iter(range(99))

        def loss(bad=bad, count=count):
            return engine.model() * (math.nan if next(count) == bad else 1)

        if case == "dizo" and (engine.step_count % 4) >= 2:
            run(engine, 1)  # a projection's step only forgets its round
            continue
        assert math.isnan(engine.step(loss, LR))
        assert torch.equal(flat(engine), before), bad
        assert same(kept(engine), memory), bad
    skipped = engine.metrics()["skipped_steps"]
    assert skipped >= 1
    run(engine, 2)
    assert torch.isfinite(flat(engine)).all() and engine.metrics()["skipped_steps"] == skipped
    assert not torch.equal(flat(engine), before)


@METHOD
def test_an_exception_leaves_no_trace(case):
    """In any of a step's forwards, with memory that `ask` or a first round has written already."""
    engine, twin = engine_of(case), engine_of(case)
    run(engine, 2), run(twin, 2)
    for at in range(1 if case == "forward-grad" else method(case).forwards):
        before, memory, count = flat(engine), kept(engine), iter(range(99))

        def loss(at=at, count=count):
            if next(count) == at:
                raise KeyboardInterrupt
            return engine.model()

        with pytest.raises(KeyboardInterrupt):
            engine.step(loss, LR)
        assert torch.equal(flat(engine), before) and same(kept(engine), memory), at
    run(engine, 2), run(twin, 2)
    if method(case).low_rank:
        # Merged at other steps, to other roundings: either loss is off by an ulp of 1.9e-6, g by 1.9e-5, along a
        # direction of up to 10, in two steps.
        assert (flat(engine) - flat(twin)).abs().max() < 2 * 1.9e-5 * LR * 10
    else:
        assert torch.equal(flat(engine), flat(twin))


@METHOD
def test_frozen_and_tied_tensors(case):
    """A frozen tensor stays and changes nobody's noise; a tied one has one noise and one state."""
    ids, ends = tokens(), []
    for freeze in (False, True):
        model = tiny("llama-tied")
        model.model.norm.weight.requires_grad_(not freeze)
        settings = {"project": "k_proj,v_proj"} if case == "dizo" else {}
        engine = engine_of(case, model=model, **settings)
        assert "lm_head.weight" not in engine.blocks.names
        assert ("model.norm.weight" in engine.blocks.names) is not freeze
        assert all(len(v) <= len(engine.blocks) for v in engine.method.state_dict().values() if isinstance(v, list))
        seen = []

        def loss(model=model, seen=seen):
            # Inside the forward, so that the perturbed weights are seen: q_proj's through its hook's input and output.
            return model(input_ids=ids, labels=ids).loss

        def look(module, args, output, seen=seen):
            seen.append(module.weight.detach().clone())

        if engine.method.low_rank:  # no weight is perturbed (tests/test_lowrank_probing.py looks at the output)
            engine.step(loss, 1e-3)
            assert torch.equal(model.model.norm.weight, torch.ones(32)) is freeze
            continue
        handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(look, prepend=True)
        engine.step(loss, 1e-3)
        handle.remove()
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.model.norm.weight, torch.ones(32)) is freeze
        ends.append(seen[1 if len(seen) > 1 else 0])
    assert not ends or torch.equal(*ends)


@METHOD
def test_eight_by_one_equals_two_by_four(case, tmp_path):
    ends = []
    for batch, accumulate in ((8, 1), (2, 4)):
        model = tiny("llama-tied")
        settings = {"project": "k_proj", "period": 1, "rounds": 1} if case == "dizo" else {}
        trainer = ZOTrainer(
            model=model, args=arguments(tmp_path, batch, accumulate, steps=2, learning_rate=1e-4),
            train_dataset=Rows(), zo={"optimizer": method(case, **settings), "eps": 1e-2},
        )  # fmt: skip
        trainer.train()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in tiny("llama-tied").parameters()])
    moved, apart = (ends[0] - start).norm(), (ends[0] - ends[1]).norm()
    # The windows' losses differ by an ulp of 4.8e-7, so g by 2e-5 of some 1; signs of small coordinates may flip.
    assert 0 < moved and apart < 2e-3 * moved


@METHOD
def test_sixteen_bits_and_predicted_state(case):
    """bf16 weights take a finite step, and the state that `zo plan` counts on a model of shapes is the one that is."""
    model, ids = tiny("llama", torch.bfloat16), tokens()
    settings = {"project": "k_proj,v_proj"} if case == "dizo" else {}
    engine = engine_of(case, "auto", model=model, grouped=True, **settings)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    engine.step(lambda: model(input_ids=ids, labels=ids).loss, 1e-3)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.isfinite(after).all() and not torch.equal(before, after)
    name, own = CASES[case]
    shapes = tiny("llama", torch.bfloat16).to("meta")
    planned = make_method(name, shapes, settings={**own, **settings})
    assert size(planned.state_dict()) == size(engine.method.state_dict())


def size(state):
    return sum(t.nbytes for v in state.values() for t in (v if isinstance(v, list) else [v]))


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
