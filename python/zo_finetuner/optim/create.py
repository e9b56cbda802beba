"""A method by its name, ready for a model: what the command line, the Trainer mixin and `create_zo_optimizer` share.

A name stands for a kind of method, what its parts are, and the rates of the paper's scripts (for full fine-tuning where
they tell).  A new method takes a file, and a line here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from zo_finetuner.errors import InputError, nearest
from zo_finetuner.optim.base import Method
from zo_finetuner.optim.composed import Composed
from zo_finetuner.optim.dizo import DiZO
from zo_finetuner.optim.finetuner import ZOFineTuner
from zo_finetuner.optim.fixed_scales import FixedScales, SigmaOne
from zo_finetuner.optim.hizoo import HiZOO
from zo_finetuner.optim.ldsd import LDSD
from zo_finetuner.optim.learned import constant_scales, learned_scales, ones
from zo_finetuner.optim.low_rank import LowRank, LowRankMomentum
from zo_finetuner.optim.mezo import MeZO
from zo_finetuner.optim.scales import Asked, Nets, Ones
from zo_finetuner.optim.self_calibrated import SelfCalibrated, calibrated_scales
from zo_finetuner.optim.settings import build
from zo_finetuner.params import trainable_blocks


@dataclass(frozen=True)
class Preset:
    """lr, eps, schedule (of lr, `zo train`'s): where none are given.  settings: that differ from the kind's defaults.
    scales: makes its policy for a model; None: there is none unless nets are given."""

    kind: type[Method]
    lr: float = 1e-6
    eps: float = 1e-3
    settings: Mapping[str, Any] = field(default_factory=dict)
    scales: Callable[[nn.Module, Asked], Ones] | None = None
    schedule: str = "constant"


TO_A_TENTH = "cosine_with_min_lr"

PRESETS = {
    "mezo": Preset(MeZO),
    "zo-finetuner": Preset(ZOFineTuner, scales=learned_scales),
    "sigma-one": Preset(SigmaOne, scales=ones),
    "closed-form": Preset(FixedScales, scales=constant_scales),
    "self-calibrated": Preset(SelfCalibrated, scales=calibrated_scales),
    "ldsd-sgd": Preset(LDSD, lr=1e-3, schedule=TO_A_TENTH),
    "ldsd-adamm": Preset(LDSD, lr=1e-3, settings={"rule": "adamm"}, schedule=TO_A_TENTH),
    "ldsd-jaguar": Preset(LDSD, lr=1e-3, settings={"rule": "sign-ema"}, schedule=TO_A_TENTH),
    "zo-momentum": Preset(Composed, settings={"rule": "momentum"}),
    "zo-adam": Preset(Composed, settings={"rule": "adam"}),
    "zo-adamm": Preset(Composed, lr=1e-3, settings={"rule": "adamm"}, schedule=TO_A_TENTH),
    "zo-sign": Preset(Composed, settings={"rule": "sign"}),
    "zo-conservative": Preset(Composed, settings={"estimator": "conservative"}),
    "hizoo": Preset(HiZOO),
    "fzoo": Preset(
        Composed, lr=5e-5, eps=1e-4,
        settings={"dist": "rademacher", "estimator": "one-sided", "probes": 8, "spread": True},
    ),
    "sparse-mezo": Preset(Composed, settings={"subset": "small"}),
    "mezo-gv": Preset(Composed, settings={"estimator": "guided"}),
    "bszo": Preset(Composed, lr=1e-7, eps=1e-4, settings={"estimator": "bayesian"}),
    "dizo": Preset(DiZO),
    "es": Preset(
        Composed, lr=5e-4, settings={"estimator": "one-sided", "probes": 30, "baseline": "mean", "spread": True}
    ),
    "lozo": Preset(LowRank),
    "lozo-m": Preset(LowRankMomentum),
    "subzero": Preset(LowRank, settings={"rank": 8, "period": 1000, "two_sided": True}),
    "es-lowrank": Preset(LowRank, settings={"rank": 1, "period": 0, "limit": 16, "probes": 4}),
    "forward-grad": Preset(Composed, lr=5e-7, settings={"estimator": "slope"}),
}  # fmt: skip
METHODS = tuple(PRESETS)


def make_method(
    name: str,
    model: nn.Module,
    *,
    batch_size: int = 16,
    seed: int = 0,
    pertnn: Nets | None = None,
    transfer: bool = False,
    normalize: bool = True,
    dist: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Method:
    """name: one of METHODS.  batch_size: examples per step, all micro-batches and ranks together (it sets the
    embedding's share of the perturbation).  pertnn: learned nets or scales, a file of them, or None; they go with every
    method that does not scale by itself.  "zo-finetuner" without them has fresh random nets (seeded with `seed`), which
    are a control and not a learned optimizer.  transfer: take nets or scales that were learned for another depth or
    width (`optim/transfer.py`), with a warning; without it they are refused.  Blocks whose learned scale is exactly
    zero are frozen.  settings: of the method and its parts (`optim.settings`), dist among them.  Raises InputError."""
    given = {**(settings or {}), **({} if dist is None else {"dist": dist})}
    method = check_method(name, pertnn, given, transfer)
    scales = PRESETS[name].scales or (None if pertnn is None else learned_scales)
    if scales is not None:
        method.scales = scales(model, Asked(method, pertnn, batch_size, seed, normalize, transfer))
    method.prepare(trainable_blocks(model))
    if pertnn is None or isinstance(pertnn, str | os.PathLike):
        method.recipe = {
            "name": name, "batch_size": batch_size, "seed": seed, "transfer": transfer, "normalize": normalize,
            "pertnn": None if pertnn is None else os.fspath(pertnn), "settings": given,
        }  # fmt: skip
    return method


def check_method(
    name: str, pertnn: Any = None, settings: Mapping[str, Any] | None = None, transfer: bool = False
) -> Method:
    """The method as it is before it has seen a model, which its scales are made for.  InputError for an unknown name,
    for settings that it does not have or that cannot work, for nets given to a method that takes none, and for a
    transfer of nothing."""
    if name not in PRESETS:
        raise InputError(f'unknown optimizer "{name}"{nearest(name, PRESETS)}; there are: {", ".join(PRESETS)}')
    preset = PRESETS[name]
    method = build(name, preset.kind, preset.settings, settings or {})
    if pertnn is not None and "scales" in preset.kind.fixed:
        raise InputError(f"pertnn is given, but {name} has no nets: {preset.kind.fixed['scales']}")
    if transfer and pertnn is None:
        raise InputError("transfer is asked for, but nothing to transfer is given: give --pertnn FILE")
    return method
