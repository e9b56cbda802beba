"""The equations of methods in numpy, written from the papers alone (the docstrings in `optim/` state them): float64 on
materialised noise, a generator each, which is handed a step's learning rate and moves `p.theta`."""

from __future__ import annotations

import itertools

import numpy as np
from problems import EPS, SHAPES, places

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
