"""Virtual tokens, which PEFT puts before every row, and what has to be told of them to the model inside.

    prefix   keys and values of V places in every layer, as a cache    T states a row, mask (N, 1, T, V + T)
    prompt   V embeddings before the row's own                         V + T states,   mask (N, 1, V + T, V + T)

The token at position p of a sequence stands at V + p, and every sequence of a packed row sees the V.  PEFT counts them
in for a 2-D mask or none; it drops positions (prompt) and cannot lengthen a 4-D mask.  So it is called without both,
and the model inside is given them in full.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zo_finetuner.routes import Forward, rerouted_inside
from zo_finetuner.rows import unwrap

IN_A_CACHE = ("PREFIX_TUNING", "CARTRIDGE")
ONE_PROMPT = ("PROMPT_TUNING", "P_TUNING")  # the same for all rows, made by a module that takes one row of ids


@dataclass(frozen=True)
class VirtualTokens:
    """count: V, 0 for none.  embedded: whether they are rows of the model's input, as in prompt tuning."""

    count: int = 0
    embedded: bool = False

    @property
    def ahead(self) -> int:
        """How many states of a row come before its own tokens'."""
        return self.count if self.embedded else 0

    def keys(self, positions: Tensor) -> Tensor:
        """(N, V + T) positions of all that attention looks at, of the tokens' own (N, T)."""
        virtual = torch.arange(self.count, device=positions.device).expand(positions.shape[0], -1)
        return torch.cat((virtual, positions + self.count), 1)

    def queries(self, positions: Tensor) -> Tensor:
        """Positions of all that looks: (N, T), or (N, V + T) where virtual tokens are embedded."""
        return self.keys(positions) if self.embedded else positions + self.count

    def seen(self, seen: Tensor) -> Tensor:
        """(N, queries, keys) bool, of what the tokens see of each other, (N, T, T)."""
        rows, length, _ = seen.shape
        seen = torch.cat((seen.new_ones(rows, length, self.count), seen), 2)
        if not self.embedded:
            return seen
        causal = seen.new_ones(self.count, self.count + length).tril()
        return torch.cat((causal.expand(rows, -1, -1), seen), 1)

    @contextlib.contextmanager
    def inside(self, model: nn.Module, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields what the model is to be called with so that the one inside gets inputs (N rows each): those, or
        nothing.  A doubled batch gets them repeated."""
        if not self.count:
            yield inputs
            return

        def give(_: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
            given = kwargs.get("input_ids")
            rows = (kwargs["inputs_embeds"] if given is None else given).shape[0]
            return forward(*args, **kwargs | {name: _repeated(value, rows) for name, value in inputs.items()})

        with rerouted_inside(unwrap(model), give):
            yield {}


NONE = VirtualTokens()


def virtual_tokens(model: nn.Module) -> VirtualTokens:
    """Those of a PEFT model's active adapter."""
    learner = _learner(model)
    if learner is None:
        return NONE
    config = learner.active_peft_config
    return VirtualTokens(config.num_virtual_tokens, config.peft_type.value not in IN_A_CACHE)


@contextlib.contextmanager
def prompt_of_every_row(model: nn.Module) -> Iterator[None]:
    """Within it PEFT makes a prompt for every row of a batch, where it makes one and repeats it: a doubled batch needs
    two (`paired.py`)."""
    learner = _learner(model)
    if learner is None or learner.active_peft_config.peft_type.value not in ONE_PROMPT:
        yield
        return

    def get_prompt(batch_size: int, *args: Any, **kwargs: Any) -> Tensor:
        encoder, ids = (getattr(learner, name)[learner.active_adapter] for name in ("prompt_encoder", "prompt_tokens"))
        return encoder(ids.to(encoder.embedding.weight.device).expand(batch_size, -1))

    learner.__dict__["get_prompt"] = get_prompt
    try:
        yield
    finally:
        del learner.__dict__["get_prompt"]


def _learner(model: nn.Module) -> Any:
    """The PEFT model of virtual tokens inside torch.compile and DistributedDataParallel wrappers, or None."""
    while not hasattr(model, "get_base_model"):
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return None
        model = inner
    config = model.active_peft_config
    return model if config.is_prompt_learning else None


def _repeated(value: Any, rows: int) -> Any:
    if isinstance(value, dict):
        return {key: _repeated(item, rows) for key, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    return value.repeat(rows // value.shape[0], *(1,) * (value.dim() - 1))
