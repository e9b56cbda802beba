"""Tensors that a method keeps for every weight, and whether they fit before they are made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_finetuner.errors import InputError
from zo_kernels import Blocks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def new_states(
    blocks: Blocks, names: Sequence[str], what: str, *, fill: float = 0.0, dtype: torch.dtype = torch.float32
) -> dict[str, list[Tensor]]:
    """For each name a tensor per block, shaped like it.  Raises InputError where they do not fit."""
    for device in {t.device for t in blocks.tensors}:
        count = sum(t.numel() for t in blocks.tensors if t.device == device)
        require_room(device, len(names) * count * dtype.itemsize, f"{what} ({', '.join(names)})")
    return {
        name: [torch.full(t.shape, fill, dtype=dtype, device=t.device) for t in blocks.tensors] for name in names
    }


def require_room(device: torch.device, needed: int, what: str) -> None:
    """InputError unless `needed` bytes are free on the device; where that cannot be asked, nothing."""
    free = free_bytes(device)
    if free is not None and needed > free:
        raise InputError(
            f"the state of {what} needs {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on {device}: use "
            f"a rule without state, a LoRA adapter, or a device of more memory (`zo plan` predicts it)"
        )


def free_bytes(device: torch.device) -> int | None:
    """None where it cannot be told."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu":
        try:
            with open("/proc/meminfo", encoding="ascii") as lines:
                return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
        except (OSError, StopIteration):
            return None
    return None
