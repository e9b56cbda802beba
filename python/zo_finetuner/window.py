"""The loss of an accumulation window from its micro-batches, one rule for any split of them over processes:

    loss = sum of loss sums / sum of weights

A window is a (2, M) fp32 tensor: the M micro-batches' loss sums, and their weights (rows, tokens, or 1 for a mean).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def as_window(loss: Any, device: torch.device) -> Tensor:
    """What a loss function has returned, detached and in fp32: 0-dim for a loss, (2, M) for a window."""
    return torch.as_tensor(loss, dtype=torch.float32, device=device).detach()


def total(window: Tensor) -> Tensor:
    """0-dim: of a loss itself."""
    return window if window.dim() == 0 else window[0].sum() / window[1].sum()


def flat(items: list[Tensor | tuple[Tensor, ...]]) -> list[Tensor]:
    """The windows of a list whose slopes hold two: of the loss, and of its derivative."""
    return [window for item in items for window in (item if isinstance(item, tuple) else (item,))]


def pairs(window: Tensor) -> Tensor:
    """(2, M); a loss is a micro-batch of weight 1."""
    return torch.stack((window, torch.ones_like(window))).unsqueeze(1) if window.dim() == 0 else window
