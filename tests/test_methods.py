"""Every method against a dense numpy version of its equations, over three steps.

The numpy versions are written from the papers' equations alone (the docstrings in `optim/` state them), in float64 on
materialised noise, one generator each: it is handed a step's learning rate and moves `p.theta`.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from problems import EPS, LR, SEED, SHAPES, Dense, Problem, places, run

from zo_finetuner.engine import Engine
from zo_finetuner.optim import PRESETS
from zo_finetuner.optim.scales import Constant
from zo_finetuner.optim.settings import build
from zo_kernels import draw_noise, seed_tensor


def pair(p, z):
    return (p.f(p.theta + EPS * z) - p.f(p.theta - EPS * z)) / (2 * EPS)


def mezo(p, probes=1):
    while True:
        zs = [p.z(k) for k in range(probes)]
        gs = [pair(p, z) / probes for z in zs]
        p.theta = p.theta - p.lr * sum(g * z for g, z in zip(gs, zs, strict=True))
        yield


def momentum(p, beta=0.9):
    m = 0
    while True:
        z = p.z()
        m = beta * m + pair(p, z) * z
        p.theta = p.theta - p.lr * m
        yield


def adam(p, b1=0.9, b2=0.999, eps=1e-8):
    m = v = 0
    t = 0
    while True:
        z = p.z()
        e, t = pair(p, z) * z, t + 1
        m, v = b1 * m + (1 - b1) * e, b2 * v + (1 - b2) * e**2
        p.theta = p.theta - p.lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        yield


def adamm_of(p, estimates, b1=0.9, b2=0.999, eps=1e-10):
    m = v = top = 0
    for e in estimates:
        m, v = b1 * m + (1 - b1) * e, b2 * v + (1 - b2) * e**2
        top = np.maximum(top, v)
        p.theta = p.theta - p.lr * m / (np.sqrt(top) + eps)
        yield


def adamm(p):
    def estimates():
        while True:
            z = p.z()
            yield pair(p, z) * z

    yield from adamm_of(p, estimates())


def sign(p, elementwise=False, probes=1):
    while True:
        zs = [p.z(k) for k in range(probes)]
        gs = [pair(p, z) / probes for z in zs]
        if elementwise:
            p.theta = p.theta - p.lr * np.sign(sum(g * z for g, z in zip(gs, zs, strict=True)))
        else:
            p.theta = p.theta - p.lr * sum(np.sign(g) * z for g, z in zip(gs, zs, strict=True)) / probes
        yield


def normalized(p, beta=0.9, probes=1):
    average = weight = 0
    while True:
        zs = [p.z(k) for k in range(probes)]
        gs = [pair(p, z) / probes for z in zs]
        average, weight = beta * average + (1 - beta) * sum(g**2 for g in gs), beta * weight + 1 - beta
        e = sum(g * z for g, z in zip(gs, zs, strict=True))
        p.theta = p.theta - p.lr * e / np.sqrt(average / weight)
        yield


def conservative(p):
    while True:
        z = p.z()
        step = p.lr * pair(p, z) * z
        p.theta = min((p.theta, p.theta - step, p.theta + step), key=p.f)
        yield


def hizoo(p, alpha, centred):
    h = np.ones_like(p.theta)
    while True:
        z = p.z()
        d = z / np.sqrt(h)
        plus, minus, center = p.f(p.theta + EPS * d), p.f(p.theta - EPS * d), p.f(p.theta)
        curvature = abs(plus + minus - 2 * center) / (2 * EPS**2)
        h = (1 - alpha) * h + alpha * curvature * (z**2 - centred) * h
        p.theta = p.theta - p.lr * (plus - minus) / (2 * EPS) * z / np.sqrt(h)
        yield


def one_sided(p, probes, spread, mean):
    while True:
        zs = [p.z(k) for k in range(probes)]
        f = np.array([p.f(p.theta + EPS * z) for z in zs])
        if mean and not spread:  # leave-one-out
            others = [np.mean(np.delete(f, k)) for k in range(probes)]
            g = (f - others) / (probes * EPS)
        else:
            base = f.mean() if mean else p.f(p.theta)
            g = (f - base) / (probes * (np.std(f) if spread else EPS))
        p.theta = p.theta - p.lr * sum(gk * z for gk, z in zip(g, zs, strict=True))
        yield


def sparse(p, sparsity):
    mask = np.ones_like(p.theta, bool)
    limits = {}
    for name in ("embed", "k_proj"):
        size = np.sort(np.abs(p.start[places()[name]]))
        limits[name] = size[int((1 - sparsity) * len(size)) - 1]
    while True:
        for name, limit in limits.items():
            mask[places()[name]] = np.abs(p.theta[places()[name]]) <= limit * (1 + 1e-7)
        z = mask * p.z()
        p.theta = p.theta - p.lr * pair(p, z) * z
        yield


def guided(p, candidates, greedy):
    kept = None
    while True:
        seeds = [p.seed(k) for k in range(candidates - 1)] + [p.seed(candidates - 1) if kept is None else kept]
        losses = [p.f(p.theta + EPS * p.z(seed=s)) for s in seeds]
        kept = seeds[int(np.argmin(losses))]
        v = p.z(seed=kept) - (0 if greedy else p.z(seed=seeds[int(np.argmax(losses))]))
        p.theta = p.theta - p.lr * pair(p, v) * v
        yield


def bszo(p, reference):
    prior = len(p.theta) / 1e6
    noise = prior
    while True:
        center, mean, variance = p.f(p.theta), np.zeros(2), np.full(2, prior)
        zs = [p.z(0), p.z(1)]
        ys = [(p.f(p.theta + EPS * z) - center) / EPS for z in zs]
        for sample in range(3):
            j = sample if sample < 2 else int(np.argmax(variance))
            y = ys[j]
            if sample == 2 and not reference:
                y = (center - p.f(p.theta - EPS * zs[j])) / EPS
            r = y - mean[j]
            noise = max(0.9 * noise + 0.1 * r**2, 0.01 * prior)
            gain = variance[j] / (variance[j] + noise)
            mean[j] += gain * r
            variance[j] -= gain * variance[j]
            variance += 1e-10
        p.theta = p.theta - p.lr * (mean[0] * zs[0] + mean[1] * zs[1])
        yield


def dizo(p, tau=0.2, reach=0.1, step=2.0):
    """One step of MeZO, then two of projection."""
    here, gamma = places()["k_proj"], 0.0

    def at(ratio):
        theta = p.theta.copy()
        theta[here] = p.start[here] + ratio * (theta[here] - p.start[here])
        return theta

    while True:
        z = p.z()
        p.theta = p.theta - p.lr * pair(p, z) * z
        yield
        t = gamma = np.linalg.norm(p.theta[here] - p.start[here])
        for last in (False, True):
            draws = draw_noise(len(SHAPES), seed_tensor(p.seed()), 0).double().numpy()
            z = np.clip(draws[list(SHAPES).index("k_proj")], -tau / reach * t, tau / reach * t)
            g = (p.f(at((gamma + reach * z) / t)) - p.f(at((gamma - reach * z) / t))) / (2 * reach)
            gamma = np.clip(gamma - step * t * g * z, (1 - tau) * t, (1 + tau) * t)
            if last:
                p.theta = at(gamma / t)
            yield


def forward_grad(p):
    while True:
        v = p.z()
        p.theta = p.theta - p.lr * (p.gradient() @ v) * v
        yield


def ldsd(p, move, k=5, std=1.0, rate=0.04):
    mu = np.zeros_like(p.theta)
    while True:
        xi = [p.z(j) for j in range(k)]
        f = np.array([p.f(p.theta + EPS * (mu + std * x)) for x in xi])
        best = int(np.argmin(f))
        z = mu + std * xi[best]
        move(p, (f[best] - p.f(p.theta - EPS * z)) / (2 * EPS) * z)
        advantage = (k * f - f.sum()) / (k - 1)
        mu = mu - rate / (k * std) * sum(a * x for a, x in zip(advantage, xi, strict=True))
        yield


def ldsd_by(p, rule, **settings):
    """The rule as an inner generator that is fed estimates."""
    box, state = [], {"m": 0.0}

    def sgd(p, e):
        p.theta = p.theta - p.lr * e

    def sign_ema(p, e, beta=0.5):
        state["m"] = beta * state["m"] + (1 - beta) * e
        p.theta = p.theta - p.lr * np.sign(state["m"])

    inner = adamm_of(p, (box.pop() for _ in itertools.count()))

    def by_adamm(p, e):
        box.append(e)
        next(inner)

    yield from ldsd(p, {"sgd": sgd, "adamm": by_adamm, "sign-ema": sign_ema}[rule], **settings)


DIZO = {"period": 1, "rounds": 2, "project": "k_proj"}
BSZO_LR = 1e3 * LR  # its prior is sized for 10^6 weights, and shrinks 45 to nothing

CASES = {
    "mezo": (mezo, {}),
    "mezo n-spsa": (lambda p: mezo(p, probes=3), {"probes": 3}),
    "mezo normalized": (normalized, {"rule": "normalized"}),
    "mezo normalized, 3": (lambda p: normalized(p, 0.5, 3), {"rule": "normalized", "beta": 0.5, "probes": 3}),
    "zo-momentum": (momentum, {}),
    "zo-adam": (adam, {}),
    "zo-adamm": (adamm, {}),
    "zo-sign": (sign, {}),
    "zo-sign, 3": (lambda p: sign(p, probes=3), {"probes": 3}),
    "zo-sign elementwise": (lambda p: sign(p, True), {"sign": "elementwise"}),
    "zo-sign elementwise, 3": (lambda p: sign(p, True, 3), {"sign": "elementwise", "probes": 3}),
    "zo-conservative": (conservative, {}),
    "hizoo": (lambda p: hizoo(p, 1e-3, 1), {"alpha": 1e-3}),
    "hizoo reference": (lambda p: hizoo(p, 1e-3, 0), {"alpha": 1e-3, "compat": "reference"}),
    "fzoo": (lambda p: one_sided(p, 8, True, False), {}),
    "fzoo mean": (lambda p: one_sided(p, 4, True, True), {"probes": 4, "baseline": "mean"}),
    "es": (lambda p: one_sided(p, 30, True, True), {}),
    "mezo one-sided": (lambda p: one_sided(p, 3, False, False), {"estimator": "one-sided", "probes": 3}),
    "mezo leave-one-out": (
        lambda p: one_sided(p, 4, False, True), {"estimator": "one-sided", "probes": 4, "baseline": "mean"},
    ),
    "sparse-mezo": (lambda p: sparse(p, 0.75), {}),
    "mezo-gv": (lambda p: guided(p, 2, False), {}),
    "mezo-gv greedy": (lambda p: guided(p, 4, True), {"probes": 4, "greedy": True}),
    "bszo": (lambda p: bszo(p, False), {}),
    "bszo reference": (lambda p: bszo(p, True), {"compat": "reference"}),
    "dizo": (dizo, DIZO),  # its gamma goes as far as it may
    "dizo, within": (lambda p: dizo(p, step=0.01), DIZO | {"project_step": 0.01}),
    "dizo, z clipped": (lambda p: dizo(p, tau=0.05, step=0.002), DIZO | {"tau": 0.05, "project_step": 0.002}),
    "dizo, z clipped by more": (
        lambda p: dizo(p, tau=0.05, reach=0.3, step=0.01), DIZO | {"tau": 0.05, "reach": 0.3, "project_step": 0.01},
    ),
    "forward-grad": (forward_grad, {}),
    "ldsd-sgd": (lambda p: ldsd_by(p, "sgd"), {}),
    "ldsd-sgd std": (
        lambda p: ldsd_by(p, "sgd", k=3, std=0.5, rate=0.2), {"candidates": 3, "std": 0.5, "mean_lr": 0.2},
    ),
    "ldsd-adamm": (lambda p: ldsd_by(p, "adamm"), {}),
    "ldsd-jaguar": (lambda p: ldsd_by(p, "sign-ema"), {"beta": 0.5}),
}  # fmt: skip


def steps_of(case, scale=None, curvature=1.0, **more):
    """An engine and its dense twin, three steps side by side: the largest difference after any, the largest step."""
    dense, settings = CASES[case]
    name = case.split()[0].strip(",")
    method = build(name, PRESETS[name].kind, PRESETS[name].settings, {**settings, **more})
    if scale is not None:
        method.scales = Constant(torch.tensor([scale[name] for name in SHAPES]))
    model = Problem(curvature)
    engine = Engine(model, method, eps=EPS, seed=SEED)
    p = Dense(model, scale, method.dist, BSZO_LR if name == "bszo" else LR)
    steps, apart, moved = dense(p), 0.0, 0.0
    for t in range(3):
        p.t, before = t, p.theta
        next(steps)
        run(engine, lr=p.lr)
        apart = max(apart, np.abs(model.theta().detach().numpy() - p.theta).max())
        moved = max(moved, np.abs(p.theta - before).max())
    assert len(model.seen) == (3 if name == "forward-grad" else 3 * method.forwards)
    return apart, moved


@pytest.mark.parametrize("case", CASES)
def test_three_steps_are_those_of_the_equations(case):
    apart, moved = steps_of(case)
    assert apart < 2e-5 and moved > 1e-3


@pytest.mark.parametrize("case", ["hizoo", "hizoo reference", "mezo", "zo-conservative"])
def test_on_a_hill_too(case):
    """HiZOO takes the size of a curvature."""
    apart, moved = steps_of(case, curvature=-1.0)
    assert apart < 2e-5 and moved > 1e-3


SCALE = {"embed": 0.5, "k_proj": 2.0, "bias": 1.5}


# HiZOO's curvature is its scales; BSZO's published third sample may follow either of two variances that fp32 ties.
@pytest.mark.parametrize("case", [case for case in CASES if "hizoo" not in case and case != "bszo reference"])
@pytest.mark.parametrize("dist", ["normal", "rademacher"])
def test_scales_and_distributions_go_with_every_estimator_and_rule(case, dist):
    apart, moved = steps_of(case, SCALE, dist=dist)
    assert apart < 4e-5 and moved > 1e-3


@pytest.mark.parametrize(
    "stay, down, up, moved",
    [(1, 0.5, 2, -1), (1, 2, 0.5, 1), (1, 0.2, 0.5, -1), (1, 0.5, 0.2, 1), (1, 2, 3, 0), (1, 1, 1, 0), (1, 1, 2, 0),
     (1, 2, 1, 0), (1, 0.5, 0.5, -1)],
)  # fmt: skip
def test_the_best_of_three_points_is_taken_and_a_tie_stays(stay, down, up, moved):
    model = Problem()
    before = model.theta().detach().numpy()
    preset = PRESETS["zo-conservative"]
    engine = Engine(model, build("zo-conservative", preset.kind, preset.settings, {}), eps=EPS, seed=SEED)
    losses = iter([stay, 3.0, 2.0, down, up])  # g = 1 / 2 eps
    engine.step(lambda: torch.tensor(float(next(losses))), LR)
    expected = before + moved * LR / (2 * EPS) * Dense(model).z()
    assert np.abs(model.theta().detach().numpy() - expected).max() < 1e-6


def test_bszos_noise_has_a_floor():
    """Slopes of zero: .9 of the noise is left at every sample, a hundredth of the prior at last."""
    preset = PRESETS["bszo"]
    engine = Engine(Problem(), build("bszo", preset.kind, preset.settings, {}), eps=EPS, seed=SEED)
    prior = len(engine.model.b) / 1e6
    for step in range(20):
        engine.step(lambda: torch.tensor(1.0), LR)
        wanted = prior * max(0.9 ** (3 * (step + 1)), 0.01)
        assert engine.method.state_dict()["estimator.noise"].item() == pytest.approx(wanted, rel=1e-5)


def test_hizoos_curvature_stays_positive():
    """Whatever alpha and the losses are: a step takes half of what is left of h at the most."""
    preset = PRESETS["hizoo"]
    for compat in ("intended", "reference"):
        engine = Engine(Problem(), build("hizoo", preset.kind, {}, {"alpha": 0.9, "compat": compat}), eps=EPS)
        for _ in range(5):
            losses = iter([0.0, 8.0, 8.0])
            engine.step(lambda losses=losses: torch.tensor(next(losses)), LR)
            assert all((h > 0).all() for h in engine.method.states["h"])


PUBLISHED = {
    # the settings of papers' scripts, by hand: what a name stands for where nothing is given; the schedule falls to .1
    "mezo": {"lr": 1e-6, "eps": 1e-3, "schedule": "constant", "probes": 1},
    "zo-momentum": {"beta": 0.9},
    "zo-adam": {"beta1": 0.9, "beta2": 0.999, "adam_eps": 1e-8},
    "zo-adamm": {"lr": 1e-3, "schedule": "cosine_with_min_lr", "beta1": 0.9, "beta2": 0.999, "adam_eps": 1e-10},
    "zo-sign": {"sign": "scalar"},
    "hizoo": {"alpha": 1e-8},
    "fzoo": {"lr": 5e-5, "eps": 1e-4, "probes": 8, "dist": "rademacher", "baseline": "center", "spread": True},
    "es": {"lr": 5e-4, "eps": 1e-3, "probes": 30, "baseline": "mean", "spread": True},
    "mezo-gv": {"lr": 1e-6, "eps": 1e-3, "probes": 2, "greedy": False},
    "bszo": {"lr": 1e-7, "eps": 1e-4, "probes": 2, "samples": 3},
    "dizo": {"period": 50, "rounds": 10, "project_step": 2.0, "tau": 0.2, "reach": 0.1, "project": "k_proj,v_proj"},
    "sparse-mezo": {"sparsity": 0.75},
    "forward-grad": {"lr": 5e-7},
    "lozo": {"rank": 2, "period": 50},
    "lozo-m": {"rank": 2, "period": 50, "beta": 0.9},
    "subzero": {"rank": 8, "period": 1000, "two_sided": True},
    "ldsd-sgd": {
        "lr": 1e-3, "eps": 1e-3, "schedule": "cosine_with_min_lr", "candidates": 5, "std": 1.0, "mean_lr": 4e-2,
    },
    "ldsd-adamm": {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "adam_eps": 1e-10, "candidates": 5},
    "ldsd-jaguar": {"lr": 1e-3, "schedule": "cosine_with_min_lr", "beta": 0.0, "candidates": 5},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_name_stands_for_the_published_settings(name):
    preset = PRESETS[name]
    method = build(name, preset.kind, preset.settings, {})
    owners = [preset, method, *method.parts.values()]
    for setting, value in PUBLISHED[name].items():
        assert [getattr(o, setting) for o in owners if hasattr(o, setting)][0] == value, setting
