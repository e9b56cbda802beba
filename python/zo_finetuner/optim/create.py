"""A method by its name, ready for a model: what the command line, the Trainer mixin and `create_zo_optimizer` share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from zo_finetuner.errors import InputError, nearest
from zo_finetuner.optim.base import Method
from zo_finetuner.optim.finetuner import ZOFineTuner
from zo_finetuner.optim.learned import make_finetuner, make_fixed
from zo_finetuner.optim.low_rank import LOZO, LowRankES, LOZOMomentum, SubZero, make_low_rank
from zo_finetuner.optim.mezo import MeZO
from zo_finetuner.pertnn import PertNN
from zo_finetuner.scale_net import ScaleNet


def make_method(
    name: str,
    model: nn.Module,
    *,
    batch_size: int = 16,
    seed: int = 0,
    pertnn: str | os.PathLike | PertNN | ScaleNet | None = None,
    normalize: bool = True,
    dist: str = "normal",
    settings: Mapping[str, Any] | None = None,
) -> Method:
    """name: one of METHODS.  batch_size: examples per step, all micro-batches and ranks together (it sets the
    embedding's share of the perturbation).  pertnn: learned nets or scales, a file of them, or None; "zo-finetuner"
    without them has fresh random nets (seeded with `seed`), which are a control and not a learned optimizer.
    Blocks whose learned scale is exactly zero are frozen.  settings: fields of a low-rank method (rank, period, ...) by
    name.  Raises InputError."""
    check_method(name, pertnn)
    return _MAKERS[name](
        model, batch_size=batch_size, seed=seed, pertnn=pertnn, normalize=normalize, dist=dist, settings=settings or {}
    )


def check_method(name: str, pertnn: Any = None) -> None:
    """InputError for an unknown name, and for nets given to a method that has none."""
    if name not in _MAKERS:
        raise InputError(f'unknown optimizer "{name}"{nearest(name, _MAKERS)}; there are: {", ".join(_MAKERS)}')
    if pertnn is not None and name not in (ZOFineTuner.name, "closed-form", *_SCALED):
        raise InputError(f"pertnn is given, but {name} has no nets: use --optimizer {ZOFineTuner.name}")


def _finetuner(model: nn.Module, *, settings: Mapping[str, Any], **arguments: Any) -> Method:
    return make_finetuner(model, **arguments)


def _mezo(model: nn.Module, *, dist: str, **_: Any) -> Method:
    return MeZO(dist=dist)


_MAKERS = {
    MeZO.name: _mezo,
    ZOFineTuner.name: _finetuner,
    "sigma-one": partial(make_fixed, name="sigma-one"),
    "closed-form": partial(make_fixed, name="closed-form"),
    **{kind.name: partial(make_low_rank, kind) for kind in (LOZO, LOZOMomentum, SubZero, LowRankES)},
}
_SCALED = tuple(kind.name for kind in (LOZO, LOZOMomentum, SubZero))  # nets may scale their directions
METHODS = tuple(_MAKERS)
