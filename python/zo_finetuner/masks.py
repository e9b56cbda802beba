"""What a token of a packed row sees, in the form that a model's attention takes; no form waits for the device.

transformers makes masks itself from a 2-D one or from positions that restart, but reads a value back to the host at
every forward to do so, and OPT never looks at the positions.  A mask of four dimensions it passes on as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

from zo_finetuner.rows import unwrap
from zo_finetuner.virtual_tokens import NONE, VirtualTokens

FULL, SLIDING = "full_attention", "sliding_attention"


def visible(batch: Mapping[str, Tensor]) -> Tensor:
    """(N, T, T) bool: whether query q (dimension 1) sees key k: itself and what comes before it on its branch and on
    the trunk of that."""
    position, branch = batch["position_ids"], batch["branches"]
    path = (branch[:, None] == branch[..., None]) | (branch[:, None] == batch["trunks"][..., None])
    return path & (position[:, None] <= position[..., None])


def attention_mask(
    model: nn.Module, batch: Mapping[str, Tensor], virtual: VirtualTokens = NONE
) -> Tensor | dict[str, Tensor] | None:
    """The attention_mask argument for a batch of `packing.lay_out`; virtual: what comes before every row of it.

    None where every row holds one sequence: causal attention never reaches the padding behind it, and the fast kernels
    take no mask.  Else (N, 1, T, T), bool for SDPA and additive in the model's dtype for eager attention; a dictionary
    of two for a model whose layers differ.  A window is one of positions, so that it is each sequence's own.
    """
    if "branches" not in batch:
        return None
    config = text_config(model)
    seen, position = virtual.seen(visible(batch)), batch["position_ids"]
    kinds, window = layer_kinds(config), getattr(config, "sliding_window", None)
    if SLIDING not in kinds:
        return _as_taken(model, config, seen)
    apart = virtual.queries(position)[..., None] - virtual.keys(position)[:, None]
    sliding = _as_taken(model, config, seen & (apart < window))
    return {FULL: _as_taken(model, config, seen), SLIDING: sliding} if FULL in kinds else sliding


def _as_taken(model: nn.Module, config: Any, seen: Tensor) -> Tensor:
    seen = seen[:, None]
    if config._attn_implementation == "sdpa":
        return seen
    dtype = unwrap(model).dtype
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model, also inside a multimodal one."""
    return unwrap(model).config.get_text_config()


def layer_kinds(config: Any) -> set[str]:
    """Kinds of the layers; without a list of them all slide where there is a window, as transformers takes it."""
    kinds = getattr(config, "layer_types", None)
    return set(kinds or [SLIDING if getattr(config, "sliding_window", None) else FULL])


_FIND_PACKED = getattr(masking_utils, "find_packed_sequence_indices", None)


@contextlib.contextmanager
def positions_as_given() -> Iterator[None]:
    """Within the context transformers does not search positions for packed sequences where no mask is given.

    The search ends in `(...).all()` on the host: one wait per forward, to find what the caller knows."""
    if _FIND_PACKED is None:
        yield
        return
    masking_utils.find_packed_sequence_indices = _not_packed
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = _FIND_PACKED


def _not_packed(position_ids: Tensor) -> None:
    return None


@contextlib.contextmanager
def masks_unread() -> Iterator[None]:
    """Within it transformers makes masks without looking at what is in them, as it does while a CUDA graph is captured.

    It otherwise reads back, in every forward, whether anything is padded or packed, to leave a mask out."""
    asked = torch.cuda.is_current_stream_capturing
    torch.cuda.is_current_stream_capturing = lambda: True
    try:
        yield
    finally:
        torch.cuda.is_current_stream_capturing = asked
