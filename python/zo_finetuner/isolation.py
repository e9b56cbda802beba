"""Whether a model keeps packed documents apart, tried on the model itself."""

from __future__ import annotations

import logging
import weakref

import torch
from torch import Tensor, nn

from zo_finetuner.masks import FULL, SLIDING, layer_kinds, text_config
from zo_finetuner.objective import label_logits
from zo_finetuner.packing import Document, lay_out
from zo_finetuner.rows import forward_accepts, unwrap
from zo_finetuner.virtual_tokens import VirtualTokens, virtual_tokens

logger = logging.getLogger(__name__)

_FAULTS: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[str | None, VirtualTokens], str]] = (
    weakref.WeakKeyDictionary()
)


def can_pack(model: nn.Module) -> bool:
    """Whether `encoding.collate(..., packed=True)` is for this model.

    Asked once per model, attention implementation and kind of virtual tokens: three forwards of at most 24 tokens.
    Where the answer is no, a line of the log says which model and why, and padded batches give the same losses."""
    bare = unwrap(model)
    attention = getattr(getattr(bare, "config", None), "_attn_implementation", None)
    kind = attention, virtual_tokens(model)
    if _FAULTS.get(bare, ("", ""))[0] != kind:
        fault = _declared_fault(model, attention) or _tried_fault(model)
        if fault:
            logger.warning("%s: batches are padded, not packed: %s", type(bare).__name__, fault)
        _FAULTS[bare] = kind, fault
    return not _FAULTS[bare][1]


def _declared_fault(model: nn.Module, attention: str | None) -> str:
    if attention not in ("sdpa", "eager"):
        return f"attention {attention!r} takes no mask of our own (sdpa and eager do)"
    if "position_ids" not in forward_accepts(model):
        return "its forward takes no position_ids"
    config = text_config(model)
    other = layer_kinds(config) - {FULL, SLIDING}
    if getattr(config, "attention_chunk_size", None):
        other.add("chunked_attention")
    return f"it has layers of {', '.join(sorted(other))}" if other else ""


@torch.no_grad()
def _tried_fault(model: nn.Module) -> str:
    """A branched document behind another one, against its sequences alone; the control is what a model makes of the
    row that is blind to masks and restarts.

    Distances as shares of the control's: rounding .000003 in fp32 and .006 in bf16 at most, blind to masks alone or to
    positions alone .36 at least (ten models that can, five that cannot).  An eighth is far from both.
    """
    vocabulary = text_config(model).vocab_size
    tokens = tuple(1 + i * 7 % (vocabulary - 1) for i in range(16))
    trunk, branches = tokens[6:11], (tokens[11:14], tokens[14:])
    row = (Document(tokens[:6]), Document(trunk, branches))
    labels = [(1, 0, 4), (1, 0, 7), (1, 1, 6)]
    packed = lay_out(row, [[0, 1]], labels, 0)
    blind = {"input_ids": packed["input_ids"], "places": packed["places"], "chosen": packed["chosen"]}
    blind["position_ids"] = torch.arange(16)[None]
    sequences = [Document(trunk), *(Document(trunk + branch) for branch in branches)]
    alone = lay_out(sequences, [[0], [1], [2]], [(i, 0, len(s) - 1) for i, s in enumerate(sequences)], 0)

    training = model.training
    model.eval()
    try:
        logits = [_logits(model, batch) for batch in (packed, blind, alone)]
    except Exception as error:  # a model that does not take a 4-D mask fails in its own way
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        model.train(training)
    moved, control = ((x - logits[2]).norm() for x in logits[:2])
    return "" if 8 * moved < control else "its forward does not keep them apart"


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    device = next(model.parameters()).device
    return label_logits(model, {name: tensor.to(device) for name, tensor in batch.items()}).float()
