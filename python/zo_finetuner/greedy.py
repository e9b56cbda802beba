"""Greedy text behind virtual tokens, token by token on the cache of PEFT's own forward.

PEFT 0.21's `generate` puts its virtual tokens before every new token again where transformers calls its cache `cache`
(5.20 and later), and so continues another text.
"""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor, nn

from zo_finetuner.rows import forward_accepts, unwrap


@torch.no_grad()
def continue_greedily(model: nn.Module, input_ids: Tensor, most: int, ends: Set[int]) -> Tensor:
    """(N, at most `most`) int64 tokens that follow input_ids (N, T), which are not padded.  Ends when every row has one
    of `ends`; what a row has behind its first is to be ignored."""
    kept = "cache" if "cache" in forward_accepts(model) else "past_key_values"
    output = model(input_ids=input_ids, use_cache=True)
    new: list[Tensor] = []
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    last = torch.tensor(sorted(ends), device=input_ids.device)
    while True:
        new.append(output.logits[:, -1].argmax(-1))
        ended |= torch.isin(new[-1], last)
        if len(new) == most or ended.all():
            return torch.stack(new, 1)
        output = unwrap(model)(input_ids=new[-1][:, None], use_cache=True, **{kept: output[kept]})
