"""Which rows of a module's weight a forward uses, so that a probe perturbs those only.

    embedding   the looked-up tokens: the scratch holds one row per token of the batch, and the module is given
                0, 1, 2, ... instead of the token ids.  No `unique`, hence no wait for the host.
    head        the candidates' rows that `rows.head_rows` asked for: the logits have one column per candidate; or the
                slice that `slices.head_slices` is at.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rows_in_use(module: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor | None, tuple[tuple, dict] | None]:
    """(rows, replaced): int64 row numbers or None for all rows; and the (args, kwargs) that the module should be
    called with instead, or None to leave them."""
    rows = getattr(module, "_zo_rows", None)
    if rows is not None:
        return rows, None
    # Subclasses with a forward of their own (OPT's learned positions) look up other rows than they are given.
    if type(module).forward is nn.Embedding.forward and module.max_norm is None:
        tokens = args[0] if args else kwargs["input"]
        if tokens.numel() < module.num_embeddings:
            rows = tokens.reshape(-1).to(torch.int64)
            places = torch.arange(rows.numel(), device=rows.device).view(tokens.shape)
            return rows, ((places, *args[1:]), kwargs) if args else (args, {**kwargs, "input": places})
    return None, None
