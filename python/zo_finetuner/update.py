"""An update as one kernel call: all terms, and the state of a rule, in one read and one write of the weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from zo_finetuner.optim.base import Update
from zo_finetuner.optim.directions import Stacked, Terms
from zo_kernels import Blocks, update_, update_state_


def apply_terms(blocks: Blocks, terms: Terms, decay: Tensor | None = None, rounding_seed: Tensor | None = None) -> None:
    """theta = round(decay * theta + sum coef * direction), in the order of the terms; one distribution and form.

    coefs, decay: 0-dim fp32 (decay may be None); rounding_seed: 0-dim int64, None to round to nearest.  ValueError for
    two distributions or forms."""
    if terms:
        move = Stacked.of(terms)
        update_(blocks, move.seeds, move.coefs, move.scale, decay=decay, rounding_seed=rounding_seed, dist=move.dist,
                form=move.form)  # fmt: skip


def guarded(update: Update, finite: Tensor) -> Update:
    """With coefficients of 0 unless `finite`: selected, not multiplied, since 0 * inf is NaN."""

    def chosen(terms: Terms) -> Terms:
        return [(direction, torch.where(finite, coef, 0.0)) for direction, coef in terms]

    mean = None if update.mean is None else (update.mean[0], chosen(update.mean[1]))
    return replace(update, terms=chosen(update.terms), mean=mean)


def apply_update(
    blocks: Blocks, update: Update, finite: Tensor, decay: Tensor | None, rounding_seed: Tensor
) -> None:
    """An update that is `guarded`.  finite: 0-dim bool; where it is not, weights and states keep every bit."""
    if update.mean is not None and update.by is None and update.mean[0].tensors[0].dtype == torch.float32:
        return _with_mean(blocks, update, finite, decay, rounding_seed)
    if update.by is not None:
        move = Stacked.of(update.terms)
        update_state_(
            blocks, update.by.rule, update.by.states, move.seeds, move.coefs, move.scale, numbers=update.by.numbers,
            form=move.form, decay=decay, rounding_seed=rounding_seed, keep=finite, dist=move.dist,
        )  # fmt: skip
    else:
        apply_terms(blocks, update.terms, decay, rounding_seed)
    if update.mean is not None:
        apply_terms(*update.mean, rounding_seed=rounding_seed)
    if update.anchored is not None:
        for block, theta in enumerate(blocks.tensors):
            if update.anchored.anchors[block] is not None:
                new = torch.empty_like(theta)
                update.anchored.move(theta, new, block, None)
                theta.copy_(torch.where(finite.to(theta.device), new, theta))


def _with_mean(blocks: Blocks, update: Update, finite: Tensor, decay: Tensor | None, rounding_seed: Tensor) -> None:
    """Weights and their policy's fp32 mean in one pass over both: the directions are those of the mean's terms, and the
    weights take of each what `terms` have of it."""
    (mean, mean_terms), own = update.mean, Stacked.of(update.terms)
    move = Stacked.of(mean_terms)
    taken = torch.where(move.seeds == own.seeds[:, None], own.coefs[:, None], 0.0).sum(0)
    update_state_(
        blocks, "shifted-mean", [mean.tensors], move.seeds, move.coefs, move.scale,
        numbers=torch.cat((own.form.value.reshape(1), taken)), decay=decay, rounding_seed=rounding_seed, keep=finite,
        dist=move.dist,
    )  # fmt: skip
