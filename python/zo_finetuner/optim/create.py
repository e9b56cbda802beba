"""A method by its name, ready for a model: what the command line, the Trainer mixin and `create_zo_optimizer` share."""

from __future__ import annotations

import logging
import os
from typing import Any

from torch import nn

from zo_finetuner.errors import InputError, nearest
from zo_finetuner.optim.base import Method
from zo_finetuner.optim.finetuner import ZOFineTuner
from zo_finetuner.optim.mezo import MeZO
from zo_finetuner.params import trainable_blocks
from zo_finetuner.pertnn import PertNN, budget
from zo_finetuner.pertnn_io import load_pertnn

logger = logging.getLogger(__name__)


def make_method(
    name: str,
    model: nn.Module,
    *,
    batch_size: int = 16,
    seed: int = 0,
    pertnn: str | os.PathLike | PertNN | None = None,
    normalize: bool = True,
    dist: str = "normal",
) -> Method:
    """name: "mezo" or "zo-finetuner".  batch_size: examples per step, all micro-batches and ranks together (it sets
    the embedding's share of the perturbation).  pertnn: learned nets, a file of them, or None for fresh random nets
    (seeded with `seed`), which are a control and not a learned optimizer.  Raises InputError."""
    check_method(name, pertnn)
    return _MAKERS[name](model, batch_size=batch_size, seed=seed, pertnn=pertnn, normalize=normalize, dist=dist)


def check_method(name: str, pertnn: Any = None) -> None:
    """InputError for an unknown name, and for nets given to a method that has none."""
    if name not in _MAKERS:
        raise InputError(f'unknown optimizer "{name}"{nearest(name, _MAKERS)}; there are: {", ".join(_MAKERS)}')
    if pertnn is not None and name != ZOFineTuner.name:
        raise InputError(f"pertnn is given, but {name} has no nets: use --optimizer {ZOFineTuner.name}")


def _mezo(model: nn.Module, *, dist: str, **_: Any) -> Method:
    return MeZO(dist=dist)


def _zo_finetuner(
    model: nn.Module, *, batch_size: int, seed: int, pertnn: Any, normalize: bool, dist: str
) -> Method:
    blocks = trainable_blocks(model)
    if pertnn is None:
        logger.warning("no PertNN file: the nets are freshly initialised (seed %d), a control, not learned", seed)
        nets = PertNN.fresh(blocks.names, seed=seed)
    elif isinstance(pertnn, PertNN):
        nets = pertnn.select(blocks.names)
    else:
        nets, card = load_pertnn(pertnn)
        base, here = card.base_model, getattr(getattr(model, "config", None), "name_or_path", "")
        if base != here:
            base = base or "a model that its card does not name"
            logger.warning("%s was learned for %s, not for %s: its scales are a guess here", pertnn, base, here)
        nets = nets.select(blocks.names)
    share = None
    if normalize:
        hidden = model.config.get_text_config().hidden_size
        share = budget(blocks.names, blocks.numels, hidden_size=hidden, batch_size=batch_size, device=blocks.device)
    return ZOFineTuner(nets.to(blocks.device), share, dist=dist)


_MAKERS = {MeZO.name: _mezo, ZOFineTuner.name: _zo_finetuner}
METHODS = tuple(_MAKERS)
