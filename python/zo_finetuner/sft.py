"""TRL's SFTTrainer with zeroth-order steps: its data (text, prompt and completion, conversations), its collators.

    ZOSFTTrainer(model, args=SFTConfig(...), train_dataset=rows, zo={"optimizer": "mezo"})

The loss of a step is the model's own, as the Trainer computes it, and equals SFTTrainer's `nll`.  SFTTrainer itself
reads the head's weight past the module that owns it, where a scratch probe cannot be (and entropy and accuracy are sent
to the host at every forward); evaluation goes its way.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Trainer
from trl import SFTTrainer

from zo_finetuner.errors import InputError
from zo_finetuner.hf import ZOTrainerMixin


class ZOSFTTrainer(ZOTrainerMixin, SFTTrainer):
    """Arguments: SFTTrainer's, and the mixin's zo and objective.  InputError for a loss_type other than nll, which
    would need an objective."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        kind = getattr(self.args, "loss_type", "nll")
        if kind != "nll" and self._objective is None:
            raise InputError(f"SFTConfig(loss_type={kind!r}): steps minimise nll; give objective=... for another loss")

    def step_loss(self, model: nn.Module, batch: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        return Trainer.compute_loss(self, model, {**batch, "use_cache": False}, num_items_in_batch=num_items_in_batch)
