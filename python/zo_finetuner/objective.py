"""Training losses: fp32, from logits at the option tokens only, without a wait for the host.

An objective is `objective(model, batch) -> (loss_sum, weight)`, two fp32 scalars on the model's device. The
loss of a window of micro-batches is sum(loss_sum) / sum(weight), so eight micro-batches of one are one batch
of eight. Which loss it is, whether one prompt pass will do and what shares a row, `encoding.collate` has
decided: it shows in the batch's keys.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_finetuner.masks import attention_mask, positions_as_given
from zo_finetuner.phases import phase
from zo_finetuner.rows import forward_accepts, head_rows, label_places
from zo_finetuner.slices import head_slices
from zo_finetuner.virtual_tokens import virtual_tokens

Batch = Mapping[str, Tensor]


def training_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The objective of all eleven tasks, for a batch of `encoding.collate`.

    Classification: cross-entropy over the candidates, their mean log-probability per token as logits, summed
    over rows; weight is the number of rows. Otherwise: cross-entropy summed over the correct options' tokens;
    weight is the number of those (MeZO, Malladi et al. 2023).
    """
    if "gold" in batch:
        scores = candidate_scores(model, batch)
        with phase("loss"):
            loss = F.cross_entropy(scores, batch["gold"], reduction="sum")
        return loss, loss.new_full((), scores.shape[0])
    loss = option_losses(model, batch).sum()
    return loss, (batch["targets"] >= 0).sum().to(loss.dtype)


def candidate_scores(model: nn.Module, batch: Batch) -> Tensor:
    """(B, C) fp32 scores of the candidates, -inf where a row has fewer.

    The mean log-probability per option token. From one prompt pass: the option tokens' logits, which differ
    from it by the log-normaliser, the same for all candidates of a row, so that softmax and argmax are
    unchanged.
    """
    if "candidates" in batch:
        scores = candidate_logits(model, batch, batch["candidates"]).gather(1, batch["members"])
    else:
        lengths = (batch["targets"] >= 0).sum(1)
        scores = (-option_losses(model, batch).sum(1) / lengths)[batch["members"]]
    return scores.masked_fill(~batch["valid"], -torch.inf)


def candidate_logits(model: nn.Module, batch: Batch, token_ids: Tensor) -> Tensor:
    """(M, V) fp32 logits at the batch's M labels for the V token_ids (int64, on the model's device). Only those
    rows of the head are read, wherever `head_rows` can."""
    with head_rows(model, token_ids) as only_rows:
        logits = label_logits(model, batch)
    return (logits if only_rows else logits.index_select(1, token_ids)).float()


def option_losses(model: nn.Module, batch: Batch) -> Tensor:
    """(S, L) fp32 negative log-probabilities of the targets, 0 where there is none.  No logits over the vocabulary are
    made where the head is read in slices (`slices`)."""
    targets, counted = batch["targets"], batch["counted"]
    wanted = targets.flatten().index_select(0, counted)
    places, chosen = batch["places"], batch["chosen"]
    at_places = places.new_zeros(places.numel()).index_copy(0, chosen, wanted).view(places.shape)
    with head_slices(model, at_places) as are_losses:
        logits = label_logits(model, batch)
    with phase("loss"):
        if are_losses:
            losses = logits[:, 0].masked_fill(wanted < 0, 0.0)  # a batch of few shapes ends in such
        else:
            logits = logits.float()  # under the same name: the 16-bit ones go
            losses = F.cross_entropy(logits, wanted, reduction="none")
        return losses.new_zeros(targets.numel()).index_copy(0, counted, losses).view(targets.shape)


def label_logits(model: nn.Module, batch: Batch) -> Tensor:
    """(M, vocabulary) logits at the batch's M labels, in the model's dtype; M is `chosen`'s length."""
    accepts, virtual = forward_accepts(model), virtual_tokens(model)
    inputs = {"attention_mask": attention_mask(model, batch, virtual)}
    if "position_ids" in accepts:
        inputs["position_ids"] = virtual.queries(batch["position_ids"])
    uncached = {"use_cache": False} if "use_cache" in accepts else {}
    places = batch["places"] + virtual.ahead
    with label_places(model, places) as at_places, positions_as_given(), virtual.inside(model, inputs) as given:
        logits = at_places(model(input_ids=batch["input_ids"], **given, **uncached).logits)
    return logits.flatten(0, 1).index_select(0, batch["chosen"])
