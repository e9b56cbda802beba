"""Every method, and some compositions, sized for tests: an engine for each, and what it holds."""

from __future__ import annotations

import pytest
import torch
from problems import EPS, SEED, Problem

from zo_finetuner.engine import Engine
from zo_finetuner.optim import METHODS, PRESETS
from zo_finetuner.optim.scales import Asked
from zo_finetuner.optim.self_calibrated import Calibrated, calibrated_scales
from zo_finetuner.optim.settings import build
from zo_kernels import draw_noise, seed_tensor, tensor_ids

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


def noise(seed, dist="normal"):
    ids = tensor_ids(name for name, _ in Problem().named_parameters())
    parts = [draw_noise(tuple(p.shape), seed_tensor(seed), ids[n], dist=dist) for n, p in Problem().named_parameters()]
    return torch.cat([part.flatten() for part in parts]).double()
