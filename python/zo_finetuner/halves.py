"""A doubled batch: the rows of a model call twice, for + above for -, and how values are doubled, split and joined.

Along dimension 0 a tensor inside the model has 2B rows, or 2B * T where positions are flattened into it: both keep the
halves apart and in order.  One row is broadcast over the batch (position ids of (1, T)).  Any other number of rows, as
of tokens routed to an expert, has no known order: `NotHalves`, and the call takes two forwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import Cache

SHARED = ("cache_position", "logits_to_keep")  # arguments whose dimension 0 is not the batch's
PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class NotHalves(Exception):
    """A value that cannot be told apart into a + and a - half; says which and why."""


class Halves:
    """The arguments of a model call with the batch doubled.

    names: of the positional arguments.  rows: 2B.  length: T, dimension 1 of the input (1 where there is none).
    labelled: whether the model makes the loss.  kind: equal for calls that go the same way through the model.
    Raises NotHalves for a call without a batch, with a cache, or with arguments whose batch dimension is not clear."""

    def __init__(self, names: list[str], args: tuple, kwargs: dict[str, Any]):
        named = dict(zip(names, args, strict=True)) | kwargs
        batch = _input(named)
        self.rows, self.length = 2 * batch.shape[0], batch.shape[1] if batch.dim() > 1 else 1
        self.args = tuple(self._double(name, value) for name, value in zip(names, args, strict=True))
        self.kwargs = {name: self._double(name, value) for name, value in kwargs.items()}
        self.labelled = named.get("labels") is not None
        self.kind = " ".join(f"{name}:{_shape(value)}" for name, value in sorted(named.items()))

    def _double(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            batch = self.rows // 2
            if value.dim() == 0 or name in SHARED or (value.dim() > 1 and value.shape[0] == 1 != batch):
                return value
            if value.shape[0] == batch and (value.dim() > 1 or name == "labels"):
                return torch.cat((value, value))
            raise NotHalves(f"the model's {name} of shape {tuple(value.shape)} has no batch of {batch} rows")
        if isinstance(value, dict):
            return {key: self._double(name, item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._double(name, item) for item in value)
        if isinstance(value, PLAIN):
            return value
        raise NotHalves(f"the model's {name} is a {type(value).__name__}")

    def split(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, tuple, bool]:
        """For a call inside the model: (args, kwargs) of the + half, those of the -, whether any tensor had both."""
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):  # most calls; pytrees would take 30 us
            plus, minus = self._split(args[0])
            return ((plus,), kwargs), ((minus,), kwargs), plus is not minus
        leaves, spec = tree_flatten((args, kwargs))
        halves = [self._split(leaf) if isinstance(leaf, Tensor) else (leaf, leaf) for leaf in leaves]
        plus, minus = (tree_unflatten([half[sign] for half in halves], spec) for sign in (0, 1))
        return plus, minus, any(p is not m for p, m in halves)

    def _split(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        rows = tensor.shape[0] if tensor.dim() else 1
        positions = tensor.dim() == 1 and rows == self.length  # (T,) is shared; it may have as many rows as the batch
        if rows == 1 or (positions and rows != self.rows):
            return tensor, tensor
        if positions or rows not in (self.rows, self.rows * self.length):
            raise NotHalves(f"a tensor of shape {tuple(tensor.shape)} in a batch of {self.rows} x {self.length} tokens")
        return tensor[: rows // 2], tensor[rows // 2 :]

    def join(self, plus: Any, minus: Any, broadcast: bool = False) -> Any:
        """What a module returned for each half as one value; broadcast: its single row stands for all of the half's."""
        if isinstance(plus, Tensor):
            return self._join(plus, minus, broadcast)
        leaves, spec = tree_flatten(plus)
        pairs = zip(leaves, tree_flatten(minus)[0], strict=True)
        return tree_unflatten([self._join(p, m, broadcast) for p, m in pairs], spec)

    def _join(self, plus: Any, minus: Any, broadcast: bool) -> Any:
        if not isinstance(plus, Tensor):
            if plus is not minus and plus != minus:
                raise NotHalves(f"returns a {type(plus).__name__} that differs between the halves")
            return plus
        if plus.dim() == 0 or (broadcast and plus.shape[0] != 1):
            raise NotHalves(f"returns a tensor of shape {tuple(plus.shape)} for a half")
        if broadcast:
            plus, minus = (half.expand(self.rows // 2, *half.shape[1:]) for half in (plus, minus))
        return torch.cat((plus, minus))

    def split_output(self, output: Any, losses: bool) -> tuple[Any, Any]:
        """(+ half, - half) of what the model returned, of the same types.  losses: it has made its loss per half, a
        tensor (2,) that stands for a 0-dim one."""
        leaves, spec = tree_flatten(output)
        halves = [self._split_output(leaf, losses) for leaf in leaves]
        return tuple(tree_unflatten([half[sign] for half in halves], spec) for sign in (0, 1))

    def _split_output(self, value: Any, losses: bool) -> tuple[Any, Any]:
        if isinstance(value, Cache):  # made inside, of PEFT's prefix
            return None, None
        if not isinstance(value, Tensor):
            if not isinstance(value, PLAIN):
                raise NotHalves(f"the model returns a {type(value).__name__}")
            return value, value
        if losses and value.shape == (2,):
            return value[0], value[1]
        if value.dim() == 0 or value.shape[0] % self.rows:
            raise NotHalves(f"the model returns a tensor of shape {tuple(value.shape)} for a batch of {self.rows}")
        return value.tensor_split(2)


def _shape(value: Any) -> str:
    return str(value.dim()) if isinstance(value, Tensor) else type(value).__name__


def argument_names(forward: Callable[..., Any], args: tuple) -> list[str]:
    """Of positional arguments."""
    names = list(inspect.signature(forward).parameters)[: len(args)] if args else []
    return names + [f"argument {i}" for i in range(len(names), len(args))]


def _input(named: dict[str, Any]) -> Tensor:
    """The tensor whose dimension 0 is the batch."""
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor) and value.dim()}
    for name in ("input_ids", "inputs_embeds", *tensors):
        if name in tensors:
            return tensors[name]
    raise NotHalves("the model is called without a tensor that has a batch")
