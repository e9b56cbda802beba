"""Which tensors train: the trainable parameters of a model as `Blocks`, ties resolved, ids stable by name."""

from __future__ import annotations

import torch
from torch import nn

from zo_finetuner.errors import InputError
from zo_finetuner.shards import ShardBlocks, is_sharded, reshard
from zo_kernels import Blocks


def trainable_blocks(model: nn.Module) -> Blocks:
    """One block per parameter with `requires_grad`, in `named_parameters()` order; a tied tensor appears once, under
    its first name.  Frozen parameters are left out and change nobody's noise.  Of sharded parameters the blocks are
    this rank's pieces (`shards.py`).

    Raises InputError: an integer (quantised) base without an adapter, nothing to train, overlapping tensors."""
    for name, tensor in model.named_parameters():
        if not tensor.is_floating_point() and not hasattr(model, "peft_config"):
            raise InputError(
                f"{name} is {_short(tensor.dtype)}: zeroth-order steps move floating weights; load the model in "
                f"bfloat16, or train a LoRA adapter on it (peft.get_peft_model)"
            )
    reshard(model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise InputError("the model has no trainable parameter: every requires_grad is False")
    try:
        if any(is_sharded(p) for _, p in named):
            return ShardBlocks(named)
        return Blocks((name, p.detach()) for name, p in named)
    except ValueError as error:
        raise InputError(str(error)) from None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
