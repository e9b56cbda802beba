"""Are two replicas the same?  A number for every tensor that a changed bit changes, whatever the device.

The words of a tensor are summed as integers, exactly and so in any order, in LANES interleaved lanes that are weighted
differently: two changes that cancel have to fall into one lane.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels import Blocks

LANES = 64
WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def fingerprints(blocks: Blocks) -> Tensor:
    """(blocks,) int64.  One read of the weights."""
    return torch.stack([fingerprint(tensor).to(blocks.device) for tensor in blocks.tensors])


def fingerprint(tensor: Tensor) -> Tensor:
    """0-dim int64 of a tensor's bits, in wrapping arithmetic."""
    words = tensor.detach().reshape(-1).view(WORDS[tensor.element_size()])
    whole = words.numel() // LANES * LANES
    lanes = words[:whole].view(-1, LANES).sum(0, dtype=torch.int64)
    lanes[: words.numel() - whole] += words[whole:]
    return combined(lanes)


def combined(numbers: Tensor) -> Tensor:
    """0-dim: one number for several, each with an odd weight of its own."""
    return (numbers * (2 * torch.arange(len(numbers), device=numbers.device) + 1)).sum()


def first_difference(gathered: Tensor) -> tuple[int, list[int]]:
    """(ranks, blocks) fingerprints that are not all alike -> (the first block, the ranks that differ from rank 0)."""
    wrong = gathered != gathered[:1]
    block = int(wrong.any(0).nonzero()[0])
    return block, wrong[:, block].nonzero().flatten().tolist()
