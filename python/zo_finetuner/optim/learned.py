"""Scale policies from a file of `zo learn`, from the published networks, or from an untrained network."""

from __future__ import annotations

import logging
import os

import torch
from torch import Tensor, nn

from zo_finetuner.cards import Card, fingerprint, same_shapes
from zo_finetuner.errors import InputError
from zo_finetuner.optim.finetuner import Learned
from zo_finetuner.optim.scales import Asked, Constant, Nets
from zo_finetuner.optim.transfer import transferred
from zo_finetuner.params import trainable_blocks
from zo_finetuner.pertnn import PertNN, budget, normalizer
from zo_finetuner.pertnn_io import load_pertnn
from zo_finetuner.scale_net import ScaleNet
from zo_kernels import Blocks

logger = logging.getLogger(__name__)


def learned_scales(model: nn.Module, asked: Asked) -> Learned:
    """The learned optimizer's policy.  Without nets: fresh random ones, a control.  Blocks whose learned scale is
    exactly zero are frozen (`requires_grad_(False)`): no probe, no update, no time."""
    nets = None if asked.pertnn is None else _load(asked.pertnn, model, asked.transfer)
    if isinstance(nets, ScaleNet):
        freeze(model, nets.skipped())
    blocks = trainable_blocks(model)
    if nets is None:
        logger.warning("no PertNN file: the nets are freshly initialised (seed %d), a control, not learned", asked.seed)
        nets = PertNN.fresh(blocks.names, seed=asked.seed)
    nets = nets.select(blocks.names).to(blocks.device)
    return Learned(nets, share_of(model, blocks, asked.batch_size) if asked.normalize else None)


def ones(model: nn.Module, asked: Asked) -> Constant:
    """A scale of one for every block."""
    blocks = trainable_blocks(model)
    return Constant(torch.ones(len(blocks), device=blocks.device))


def constant_scales(model: nn.Module, asked: Asked) -> Constant:
    """The scales of a file (or a ScaleNet) that `zo learn --recipe closed-form` (or forward) made."""
    if asked.pertnn is None:
        raise InputError(f"{asked.method.name} needs its scales: `zo learn --recipe closed-form` measures them; give "
                         f"--pertnn FILE")
    nets = _load(asked.pertnn, model, asked.transfer)
    if not isinstance(nets, ScaleNet) or bool(nets.w2.count_nonzero()):
        raise InputError(f"{nets.source}: holds networks, not constant scales: use --optimizer zo-finetuner")
    freeze(model, nets.skipped())
    blocks = trainable_blocks(model)
    nets = nets.select(blocks.names).to(blocks.device)
    sigma = nets.kept * nets.log_base.detach().exp()
    return Constant((normalizer(sigma, share_of(model, blocks, asked.batch_size)) * sigma).float())


def share_of(model: nn.Module, blocks: Blocks, batch_size: int) -> Tensor:
    """c_b of the normaliser for this model, (blocks,) fp64."""
    hidden = model.config.get_text_config().hidden_size
    return budget(blocks.names, blocks.whole, hidden_size=hidden, batch_size=batch_size, device=blocks.device)


def freeze(model: nn.Module, names: tuple[str, ...]) -> None:
    """Take the named parameters out of training, and say so."""
    parameters = dict(model.named_parameters())
    frozen = [name for name in names if name in parameters]
    for name in frozen:
        parameters[name].requires_grad_(False)
    if frozen:
        logger.info("%d blocks have scale 0 and are frozen, %s among them", len(frozen), frozen[0])


def _load(pertnn: Nets, model: nn.Module, transfer: bool) -> PertNN | ScaleNet:
    nets, card = (pertnn, None) if isinstance(pertnn, nn.Module) else load_pertnn(pertnn)
    if transfer and _is_of_another(nets, card, model):
        blocks = trainable_blocks(model)
        base = f"{nets.source} ({card.base_model})" if card is not None and card.base_model else nets.source
        logger.warning("transfer: all %d blocks take what the nearest of the %d of %s has: a guess until it is tried",
                       len(blocks), len(nets.names), base)  # fmt: skip
        return transferred(nets, blocks.names, blocks.whole)
    if card is not None:
        _require_match(card, model, pertnn)
    return nets


def _is_of_another(nets: PertNN | ScaleNet, card: Card | None, model: nn.Module) -> bool:
    """Whether blocks are missing, or the card is that of other shapes."""
    if not set(trainable_blocks(model).names) <= set(nets.names):
        return True
    known = card is not None and card.base_fingerprint and not hasattr(model, "peft_config")
    return bool(known) and not same_shapes(card.base_fingerprint, fingerprint(model))


def _require_match(card: Card, model: nn.Module, path: str | os.PathLike) -> None:
    """InputError for a card of other names or shapes; a line in the log for other weights (a derivative)."""
    here = getattr(getattr(model, "config", None), "name_or_path", "")
    base = card.base_model or "a model that its card does not name"
    if card.base_fingerprint and not hasattr(model, "peft_config"):
        own = fingerprint(model)
        if not same_shapes(card.base_fingerprint, own):
            raise InputError(f"{path}: was learned for {base}, whose tensors have other names or shapes than those of "
                             f"{here or 'this model'}; learn one for this model with `zo learn`, or map "
                             f"its blocks to these with --transfer")
        names = {name for name, _ in model.named_parameters()}
        strange = [name for name in card.names if name not in names]
        if strange:
            raise InputError(f"{path}: its card has the fingerprint of this model, and scales of {strange[0]}, which "
                             f"is no tensor of it ({len(strange)} such names); learn it again")
        if card.base_fingerprint != own:
            logger.info("%s was learned for %s; these weights differ from it, as a derivative's do", path, base)
    elif card.base_model != here:
        logger.warning("%s was learned for %s, not for %s: its scales are a guess here", path, base, here)
