"""A method by its name, ready for a model: what the command line, the Trainer mixin and `create_zo_optimizer` share."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from torch import nn

from zo_finetuner.errors import InputError, nearest
from zo_finetuner.optim.base import Method
from zo_finetuner.optim.finetuner import ZOFineTuner
from zo_finetuner.optim.learned import make_finetuner, make_fixed
from zo_finetuner.optim.mezo import MeZO
from zo_finetuner.optim.self_calibrated import SelfCalibrated, make_self_calibrated
from zo_finetuner.pertnn import PertNN
from zo_finetuner.scale_net import ScaleNet


def make_method(
    name: str,
    model: nn.Module,
    *,
    batch_size: int = 16,
    seed: int = 0,
    pertnn: str | os.PathLike | PertNN | ScaleNet | None = None,
    transfer: bool = False,
    normalize: bool = True,
    dist: str = "normal",
) -> Method:
    """name: one of METHODS.  batch_size: examples per step, all micro-batches and ranks together (it sets the
    embedding's share of the perturbation).  pertnn: learned nets or scales, a file of them, or None; "zo-finetuner"
    without them has fresh random nets (seeded with `seed`), which are a control and not a learned optimizer.
    transfer: take nets or scales that were learned for another depth or width (`optim/transfer.py`), with a warning;
    without it they are refused.  Blocks whose learned scale is exactly zero are frozen.  Raises InputError."""
    check_method(name, pertnn, transfer)
    return _MAKERS[name](
        model, batch_size=batch_size, seed=seed, pertnn=pertnn, transfer=transfer, normalize=normalize, dist=dist
    )


def check_method(name: str, pertnn: Any = None, transfer: bool = False) -> None:
    """InputError for an unknown name, for nets given to a method that has none, and for a transfer of nothing."""
    if name not in _MAKERS:
        raise InputError(f'unknown optimizer "{name}"{nearest(name, _MAKERS)}; there are: {", ".join(_MAKERS)}')
    if pertnn is not None and name not in (ZOFineTuner.name, "closed-form"):
        raise InputError(f"pertnn is given, but {name} has no nets: use --optimizer {ZOFineTuner.name}")
    if transfer and pertnn is None:
        raise InputError("transfer is asked for, but nothing to transfer is given: give --pertnn FILE")


def _mezo(model: nn.Module, *, dist: str, **_: Any) -> Method:
    return MeZO(dist=dist)


_MAKERS = {
    MeZO.name: _mezo,
    ZOFineTuner.name: make_finetuner,
    "sigma-one": partial(make_fixed, name="sigma-one"),
    "closed-form": partial(make_fixed, name="closed-form"),
    SelfCalibrated.name: make_self_calibrated,
}
METHODS = tuple(_MAKERS)
