"""Which tensors train: the trainable parameters of a model as `Blocks`, ties resolved, ids stable by name."""

from __future__ import annotations

from torch import nn

from zo_finetuner.errors import InputError
from zo_finetuner.quantised import form, quantised_tensor
from zo_finetuner.shards import ShardBlocks, is_sharded, reshard
from zo_kernels import Blocks


def trainable_blocks(model: nn.Module) -> Blocks:
    """One block per parameter with `requires_grad`, in `named_parameters()` order; a tied tensor appears once, under
    its first name.  Frozen parameters are left out and change nobody's noise.  Of sharded parameters the blocks are
    this rank's pieces (`shards.py`).

    Raises InputError: a quantised base of which nobody chose what to train, nothing to train, an adapter that covers
    no floating tensor, overlapping tensors."""
    reshard(model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    quantised, adapted = quantised_tensor(model), hasattr(model, "peft_config")
    if quantised and not adapted and (not named or all(p.requires_grad or form(p) for p in model.parameters())):
        raise InputError(
            f"{quantised[0]} is {quantised[1]}: zeroth-order steps move floating weights; load the model in bfloat16, "
            f"or train an adapter on it (--adapter lora, peft.get_peft_model)"
        )
    if not named and adapted:
        raise InputError("the adapter covers no floating tensor: every requires_grad is False (load a saved one with "
                         "PeftModel.from_pretrained(..., is_trainable=True))")
    if not named:
        raise InputError("the model has no trainable parameter: every requires_grad is False")
    for name, p in named:
        if form(p):
            raise InputError(f"{name} is to be trained, but it is {form(p)}: freeze it, or load it as floats")
    try:
        if any(is_sharded(p) for _, p in named):
            return ShardBlocks(named)
        return Blocks((name, p.detach()) for name, p in named)
    except ValueError as error:
        raise InputError(str(error)) from None

