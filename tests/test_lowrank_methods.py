"""LOZO, LOZO-M, SubZero and low-rank ES against their equations in numpy, with every direction written out."""

from __future__ import annotations

import functools
import itertools

import dense_low_rank as dense
import numpy as np
import pytest
import torch
from models import tiny, tokens
from test_probing import forward_loss, snapshot

import zo_kernels as zk
from zo_finetuner.engine import Engine
from zo_finetuner.errors import InputError
from zo_finetuner.optim import make_method
from zo_finetuner.optim.low_rank import LowRank
from zo_finetuner.optim.scales import Constant
from zo_finetuner.params import trainable_blocks
from zo_kernels import derive_seed

EPS, LR, RUN = 1e-3, 2e-3, 7
NAMES = ("lozo", "lozo-m", "subzero", "es-lowrank")
SETTINGS = {
    "lozo": {"rank": 3, "period": 2},
    "lozo-m": {"rank": 3, "period": 2, "beta": 0.8},
    "subzero": {"rank": 4, "period": 2},
    "es-lowrank": {"rank": 2, "probes": 2, "limit": 6},
}


def engine_of(model, name: str, **changes) -> Engine:
    method = make_method(name, model, settings=SETTINGS[name] | changes)
    return Engine(model, method, eps=EPS, seed=RUN)


class Dense:
    """The weights of a model as fp64 arrays, and losses of the model elsewhere."""

    def __init__(self, model, ids):
        self.model, self.ids, self.blocks = model, ids, trainable_blocks(model)
        self.theta = dense.weights(self.blocks)

    def loss(self, moves, coef: float) -> float:
        dense.put(self.blocks, [t + coef * d for t, d in zip(self.theta, moves, strict=True)])
        return float(forward_loss(self.model, self.ids))

    def slope(self, moves) -> float:
        return (self.loss(moves, EPS) - self.loss(moves, -EPS)) / (2 * EPS)

    def move(self, moves, coef: float) -> None:
        self.theta = [t + coef * d for t, d in zip(self.theta, moves, strict=True)]


def two_point(run: Dense, name: str, step: int, scale) -> None:
    rank = SETTINGS[name]["rank"]
    began = step - step % 2
    moves = dense.direction(run.blocks, derive_seed(RUN, step, 0), derive_seed(RUN, began, 1), rank, name)
    if scale is not None:
        moves = [s * d for s, d in zip(scale, moves, strict=True)]
    run.move(moves, -LR * run.slope(moves))


def momentum(run: Dense, step: int, kept: dict) -> None:
    """N in the factors' own terms: (m, r) for matrices, all of a vector."""
    rank, beta, began = 3, 0.8, step - step % 2
    blocks, seed, subspace = run.blocks, derive_seed(RUN, step, 0), derive_seed(RUN, began, 1)
    moves = dense.direction(blocks, seed, subspace, rank)
    g = run.slope(moves)
    update = []
    for b, (tensor, tensor_id) in enumerate(zip(blocks.tensors, blocks.ids, strict=True)):
        if tensor.dim() != 2:
            own, new = moves[b], kept.get(b)
        else:
            v = dense.factor(subspace, tensor_id, tensor.shape[1], rank, 2**40)
            own, new = dense.factor(seed, tensor_id, tensor.shape[0], rank), kept.get(b)
            if step == began and new is not None:
                old = dense.factor(derive_seed(RUN, began - 2, 1), tensor_id, tensor.shape[1], rank, 2**40)
                new = new @ old.T @ v / tensor.shape[1]
        kept[b] = g * own if new is None else beta * new + (1 - beta) * g * own
        update.append(kept[b] if tensor.dim() != 2 else kept[b] @ v.T)
    run.move(update, -LR)


def evolution(run: Dense, step: int, antithetic: bool) -> None:
    seeds = [derive_seed(RUN, step, k) for k in range(2 if antithetic else 4)]
    found = [dense.direction(run.blocks, seed, seed, 2, "es") for seed in seeds]
    if antithetic:
        g = [run.slope(moves) / 2 for moves in found]
    else:
        losses = np.array([run.loss(moves, EPS) for moves in found])
        g = (losses - losses.mean()) / (3 * EPS)
    for moves, each in zip(found, g, strict=True):
        run.move(moves, -LR * each)


CASES = [(name, {}, False) for name in NAMES]
CASES += [
    ("es-lowrank", {"estimator": "one-sided", "baseline": "mean", "probes": 4}, False),
    ("lozo", {}, True),
    ("subzero", {}, True),
]


@pytest.mark.parametrize(("name", "changes", "scaled"), CASES)
def test_three_steps_are_the_equations(backend, name, changes, scaled):
    """Steps 0 and 2 begin a subspace.  Losses have errors of 1e-6, so g has 1e-3 and a step 1e-3 of itself."""
    model, ids = tiny("llama-tied"), tokens()
    engine, run = engine_of(model, name, **changes), Dense(tiny("llama-tied"), ids)
    scale = None
    if scaled:
        scale = torch.linspace(0.25, 2, len(run.blocks)).half().double().numpy()
        engine.method.scales = Constant(torch.from_numpy(scale).float())
    before = dense.weights(engine.blocks)
    kept: dict = {}
    for step in range(3):
        engine.step(lambda: forward_loss(model, ids), LR)
        if name == "lozo-m":
            momentum(run, step, kept)
        elif name == "es-lowrank":
            evolution(run, step, antithetic=not changes)
        else:
            two_point(run, name, step, scale)
    engine.flush()
    for b, (theta, start) in enumerate(zip(dense.weights(engine.blocks), before, strict=True)):
        moved, expected = theta - start, run.theta[b] - start
        error = np.linalg.norm(moved - expected) / np.linalg.norm(expected)
        assert error < 0.01, engine.blocks.names[b]


def best_and_worst(run: Dense, move_of, step: int, kept: dict, eps: float) -> None:
    """MeZO-GV with three candidates, the kept one last."""
    seeds = [derive_seed(RUN, step, k) for k in range(2)] + [kept.get("seed", derive_seed(RUN, step, 2))]
    losses = [run.loss(move_of(seed), eps) for seed in seeds]
    kept["seed"] = seeds[int(np.argmin(losses))]
    pairs = zip(move_of(kept["seed"]), move_of(seeds[int(np.argmax(losses))]), strict=True)
    moves = [best - worst for best, worst in pairs]
    run.move(moves, -LR * (run.loss(moves, eps) - run.loss(moves, -eps)) / (2 * eps))


def bayesian(run: Dense, move_of, step: int, kept: dict, eps: float) -> None:
    """BSZO with two directions and three samples."""
    prior = sum(t.size for t in run.theta) / 1e6
    found, center = [move_of(derive_seed(RUN, step, k)) for k in range(2)], run.loss(run.theta, 0.0)
    mean, variance, noise = np.zeros(2), np.full(2, prior), kept.get("noise", prior)
    for sample in range(3):
        j, side = (sample, 1) if sample < 2 else (int(np.argmax(variance)), -1)
        residual = side * (run.loss(found[j], side * eps) - center) / eps - mean[j]
        noise = max(0.9 * noise + 0.1 * residual**2, 0.01 * prior)
        gain = variance[j] / (variance[j] + noise)
        mean[j], variance[j] = mean[j] + gain * residual, variance[j] - gain * variance[j]
    kept["noise"] = noise
    for each, moves in zip(mean, found, strict=True):
        run.move(moves, -LR * each)


def best_of_a_line(run: Dense, move_of, step: int, kept: dict, eps: float) -> None:
    moves, center = move_of(derive_seed(RUN, step, 0)), run.loss(run.theta, 0.0)
    by = LR * (run.loss(moves, eps) - run.loss(moves, -eps)) / (2 * eps)
    run.move(moves, min((center, 0.0), (run.loss(moves, -by), -by), (run.loss(moves, by), by))[1])


ESTIMATORS = {"guided": (best_and_worst, 3), "bayesian": (bayesian, 2), "conservative": (best_of_a_line, 1)}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", ["lozo", "subzero", "es-lowrank"])
def test_a_direction_that_is_chosen_is_the_one_that_was_evaluated(name, estimator):
    """Estimators of several rounds, over a change of subspace; a direction of es-lowrank has a subspace of its own."""
    model, ids, eps = tiny("llama-tied"), tokens(), 1e-2
    dense_steps, probes = ESTIMATORS[estimator]
    settings = SETTINGS[name] | {"estimator": estimator, "probes": probes}
    engine = Engine(model, make_method(name, model, settings=settings), eps=eps, seed=RUN)
    run, kept = Dense(tiny("llama-tied"), ids), {}
    before, kind = dense.weights(engine.blocks), {"es-lowrank": "es"}.get(name, name)
    for step in range(3):
        engine.step(lambda: forward_loss(model, ids), LR)
        began = derive_seed(RUN, step - step % 2, probes)

        def move_of(seed, began=began):
            return dense.direction(run.blocks, seed, seed if kind == "es" else began, settings["rank"], kind)

        dense_steps(run, move_of, step, kept, eps)
    engine.flush()
    for b, (theta, start) in enumerate(zip(dense.weights(engine.blocks), before, strict=True)):
        moved, expected = theta - start, run.theta[b] - start
        assert np.linalg.norm(moved - expected) < 0.01 * np.linalg.norm(expected), engine.blocks.names[b]


@pytest.mark.parametrize("name", NAMES)
def test_an_update_goes_along_its_probe_also_when_a_subspace_begins(name):
    """The published LOZO draws another U for the update of every step that redraws V: correlation 0."""
    model, ids = tiny("llama"), tokens()
    engine = engine_of(model, name, **({} if name == "es-lowrank" else {"period": 2}))
    if name == "lozo-m":
        engine.method.beta = 0.0  # the last direction alone
    probed = []
    real = engine.probing.at

    def at(probe, following=None):
        probed.append(probe)
        return real(probe, following)

    engine.probing.at = at
    for step in range(5):
        probed.clear()
        engine.flush()
        before = snapshot(model)
        engine.step(lambda: forward_loss(model, ids), LR)
        engine.flush()
        rank, kind = SETTINGS[name]["rank"], {"subzero": "subzero", "es-lowrank": "es"}.get(name, "lozo")
        spans = []
        for direction in dict.fromkeys(probe.direction for probe in probed):
            seed = int(direction.seed) & (2**64 - 1)
            space = seed if kind == "es" else derive_seed(RUN, step - step % 2, 1)
            spans.append(dense.direction(engine.blocks, seed, space, rank, kind))
        for block, *span in zip(engine.blocks.names, *spans, strict=True):
            moved = (model.get_parameter(block) - before[block]).double().detach().numpy().ravel()
            span = np.stack([move.ravel() for move in span])
            fitted = np.linalg.solve(span @ span.T, span @ moved) @ span
            assert np.linalg.norm(moved - fitted) < 0.02 * np.linalg.norm(moved), (step, block)


@pytest.mark.parametrize("name", NAMES)
def test_both_backends_take_the_same_steps(cpu, name):
    found = []
    for backend in ("reference", "cpu"):
        with zk.use_backend(backend):
            model, ids = tiny("llama"), tokens()
            engine = engine_of(model, name)
            for _ in range(3):
                engine.step(functools.partial(forward_loss, model, ids), LR)
            engine.flush()
            found.append(snapshot(model))
    for block, theta in found[0].items():
        moved = theta - tiny("llama").get_parameter(block)
        assert (theta - found[1][block]).norm() < 0.01 * moved.norm(), block


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [(float("nan"),), (float("inf"),), (3e38, -3e38)], ids=str)
def test_a_step_without_finite_losses_leaves_everything(name, bad):
    """The last are finite, and their difference is not."""
    model, ids = tiny("llama"), tokens()
    engine = engine_of(model, name)
    engine.step(lambda: forward_loss(model, ids), LR)
    engine.flush()
    before = snapshot(model)
    kept = {name: value.clone() for name, value in engine.method.state_dict().items() if name != "subspace"}
    losses = itertools.cycle(bad)
    assert torch.isnan(engine.step(lambda: torch.tensor(next(losses)), LR))
    engine.flush()
    for block, theta in before.items():
        assert torch.equal(model.get_parameter(block), theta), block
    for key, value in kept.items():
        assert torch.equal(engine.method.state_dict()[key], value), key
    engine.step(lambda: forward_loss(model, ids), LR)
    engine.flush()
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
    assert torch.isfinite(model.lm_head.weight).all()


@pytest.mark.parametrize("name", NAMES)
def test_losses_without_a_spread_move_nothing(name):
    model = tiny("llama")
    before = snapshot(model)
    engine = engine_of(model, name)
    for _ in range(3):
        engine.step(lambda: torch.tensor(1.5), LR)
    engine.flush()
    for block, theta in before.items():
        assert torch.equal(model.get_parameter(block), theta), block


def test_lozo_estimates_the_gradient_times_r():
    """E g U V^T = r * gradient for entries of unit variance: a z-test on a linear loss."""
    model = torch.nn.Linear(6, 5, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    target = torch.randn(5, 6)
    engine = Engine(model, LowRank(rank=2, period=1), eps=1.0, seed=3)
    moved, steps = [], 600
    eye = torch.eye(6)

    @torch.no_grad()
    def loss():
        return (model(eye).t() * target).sum()

    for _ in range(steps):
        before = model.weight.detach().clone()
        engine.step(loss, 1.0)
        engine.flush()
        moved.append(before - model.weight.detach())
    moved = torch.stack(moved)
    z = (moved.mean(0) - 2 * target) / (moved.std(0) / steps**0.5)
    assert z.abs().max() < 4.5 and abs(float((z**2).mean()) - 1) < 1


BAD = [
    ("lozo", {"rank": 33}, r"rank 33 is above the smaller side of model.layers.0.self_attn.k_proj.weight \(16 x 32\)"),
    ("subzero", {"rank": 17}, "use rank 16 or less, or freeze that tensor"),
    ("lozo", {"rank": 0}, "rank must be at least 1, got 0"),
    ("lozo", {"period": -1}, "period must not be negative, got -1"),
    ("lozo-m", {"beta": 1.0}, "beta must be at least 0 and below 1, got 1.0"),
    ("es-lowrank", {"estimator": "one-sided", "baseline": "mean", "probes": 1}, "probes must be at least 2, got 1"),
    ("lozo", {"rule": "adam"}, "lozo does not go with the rule adam: it keeps a state"),
    ("lozo", {"rule": "sign", "sign": "elementwise"}, "lozo does not go with the rule sign"),
    ("lozo", {"subset": "small"}, "a masked product has no low rank"),
    ("lozo", {"estimator": "slope"}, "lozo does not go with the estimator slope"),
    ("lozo-m", {"rule": "normalized"}, "lozo-m takes no rule: its momentum is the rule"),
    ("lozo-m", {"two_sided": True}, "lozo-m needs one-sided directions with a period"),
    ("lozo", {"rnk": 2}, 'lozo has no setting "rnk"'),
]


@pytest.mark.parametrize(("name", "settings", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_settings_are_named(name, settings, message):
    with pytest.raises(InputError, match=message):
        make_method(name, tiny("llama"), settings=settings)


def test_rank_and_limit_of_a_population():
    """Six ranks may be collected, four come in a step: every second step merges."""
    model, ids = tiny("llama"), tokens()
    engine = engine_of(model, "es-lowrank")
    ranks = []
    for _ in range(4):
        engine.step(lambda: forward_loss(model, ids), LR)
        ranks.append(engine.probing.pending.rank)
    assert ranks == [4, 0, 4, 0]
