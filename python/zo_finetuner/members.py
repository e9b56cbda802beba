"""A repeated batch: the rows of a model call N times, once for each member (+ above -, or all of a population), and
how values are repeated, split and joined.

Along dimension 0 a tensor inside the model has N * B rows, or N * B * T where positions are flattened into it: both
keep the members apart and in order.  One row is broadcast over the batch (position ids of (1, T)).  Any other number of
rows, as of tokens routed to an expert, has no known order: `NotMembers`, and the call takes a forward for each.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import Cache

SHARED = ("cache_position", "logits_to_keep")  # arguments whose dimension 0 is not the batch's
PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)

Arguments = tuple[tuple, dict[str, Any]]


class NotMembers(Exception):
    """A value that cannot be told apart into the members'; says which and why."""


class Members:
    """The arguments of a model call with the batch repeated.

    count: N.  names: of the positional arguments.  rows: N * B.  length: T, dimension 1 of the input (1 where there is
    none).  labelled: whether the model makes the loss.  kind: equal for calls that go the same way through the model.
    Raises NotMembers for a call without a batch, with a cache, or with arguments whose batch dimension is not clear."""

    def __init__(self, count: int, names: list[str], args: tuple, kwargs: dict[str, Any]):
        named = dict(zip(names, args, strict=True)) | kwargs
        batch = batch_of(named)
        self.count = count
        self.rows, self.length = count * batch.shape[0], batch.shape[1] if batch.dim() > 1 else 1
        self.args = tuple(self._repeat(name, value) for name, value in zip(names, args, strict=True))
        self.kwargs = {name: self._repeat(name, value) for name, value in kwargs.items()}
        self.labelled = named.get("labels") is not None
        self.kind = " ".join(f"{name}:{_shape(value)}" for name, value in sorted(named.items()))

    def _repeat(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            batch = self.rows // self.count
            if value.dim() == 0 or name in SHARED or (value.dim() > 1 and value.shape[0] == 1 != batch):
                return value
            if value.shape[0] == batch and (value.dim() > 1 or name == "labels"):
                return torch.cat([value] * self.count)
            raise NotMembers(f"the model's {name} of shape {tuple(value.shape)} has no batch of {batch} rows")
        if isinstance(value, dict):
            return {key: self._repeat(name, item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._repeat(name, item) for item in value)
        if isinstance(value, PLAIN):
            return value
        raise NotMembers(f"the model's {name} is a {type(value).__name__}")

    def split(self, args: tuple, kwargs: dict[str, Any]) -> tuple[list[Arguments], bool]:
        """For a call inside the model: the arguments of each member, and whether any tensor had them all."""
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):  # most calls; pytrees would take 30 us
            parts = self.parts(args[0])
            return [((part,), kwargs) for part in parts or args * self.count], parts is not None
        leaves, spec = tree_flatten((args, kwargs))
        split = [self.parts(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]
        members = [
            tree_unflatten([leaf if own is None else own[i] for leaf, own in zip(leaves, split, strict=True)], spec)
            for i in range(self.count)
        ]
        return members, any(parts is not None for parts in split)

    def parts(self, tensor: Tensor) -> tuple[Tensor, ...] | None:
        """Views of each member's rows; None where the tensor is all members'."""
        rows = tensor.shape[0] if tensor.dim() else 1
        positions = tensor.dim() == 1 and rows == self.length  # (T,) is shared; it may have as many rows as the batch
        if rows == 1 or (positions and rows != self.rows):
            return None
        if positions or rows not in (self.rows, self.rows * self.length):
            batch = f"a batch of {self.rows} x {self.length} tokens"
            raise NotMembers(f"a tensor of shape {tuple(tensor.shape)} in {batch}")
        return tensor.tensor_split(self.count)

    def is_one_row(self, tensor: Tensor) -> bool:
        """Whether it has one row for all members' batches.  NotMembers where all members share more."""
        if self.parts(tensor) is not None:
            return False
        if tensor.dim() == 0 or tensor.shape[0] != 1:
            raise NotMembers(f"has one input of shape {tuple(tensor.shape)} for all")
        return True

    def over_rows(self, values: Tensor) -> Tensor:
        """(N, ...), a row of each member -> one for every row of its batch."""
        return values[:, None].expand(-1, self.rows // self.count, *values.shape[1:]).flatten(0, 1)

    def join(self, outputs: list[Any], broadcast: bool = False) -> Any:
        """What a module returned for each member as one value; broadcast: its single row stands for all of the
        member's."""
        if isinstance(outputs[0], Tensor):
            return self._join(outputs, broadcast)
        spec = tree_flatten(outputs[0])[1]
        leaves = zip(*(tree_flatten(output)[0] for output in outputs), strict=True)
        return tree_unflatten([self._join(values, broadcast) for values in leaves], spec)

    def _join(self, values: list[Any] | tuple, broadcast: bool) -> Any:
        first = values[0]
        if not isinstance(first, Tensor):
            if any(value is not first and value != first for value in values):
                raise NotMembers(f"returns a {type(first).__name__} that differs between members")
            return first
        if first.dim() == 0 or (broadcast and first.shape[0] != 1):
            raise NotMembers(f"returns a tensor of shape {tuple(first.shape)} for a member")
        if broadcast:
            values = [value.expand(self.rows // self.count, *value.shape[1:]) for value in values]
        return torch.cat(list(values))

    def split_output(self, output: Any, losses: bool) -> list[Any]:
        """Each member's part of what the model returned, of the same type.  losses: it has made its loss per member, a
        tensor (N,) that stands for a 0-dim one."""
        leaves, spec = tree_flatten(output)
        split = [self._split_output(leaf, losses) for leaf in leaves]
        return [tree_unflatten([parts[i] for parts in split], spec) for i in range(self.count)]

    def _split_output(self, value: Any, losses: bool) -> Any:
        if isinstance(value, Cache):  # made inside, of PEFT's prefix
            return [None] * self.count
        if not isinstance(value, Tensor):
            if not isinstance(value, PLAIN):
                raise NotMembers(f"the model returns a {type(value).__name__}")
            return [value] * self.count
        if losses and value.shape == (self.count,):
            return value.unbind()
        if value.dim() == 0 or value.shape[0] % self.rows:
            raise NotMembers(f"the model returns a tensor of shape {tuple(value.shape)} for a batch of {self.rows}")
        return value.tensor_split(self.count)


def _shape(value: Any) -> str:
    return str(value.dim()) if isinstance(value, Tensor) else type(value).__name__


def argument_names(forward: Callable[..., Any], args: tuple) -> list[str]:
    """Of positional arguments."""
    names = list(inspect.signature(forward).parameters)[: len(args)] if args else []
    return names + [f"argument {i}" for i in range(len(names), len(args))]


def batch_of(named: dict[str, Any]) -> Tensor:
    """The tensor among a call's arguments whose dimension 0 is the batch."""
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor) and value.dim()}
    for name in ("input_ids", "inputs_embeds", *tensors):
        if name in tensors:
            return tensors[name]
    raise NotMembers("the model is called without a tensor that has a batch")


@contextlib.contextmanager
def loss_per_member(model: nn.Module, members: Members) -> Iterator[list[Tensor]]:
    """Within it a Hugging Face model given labels makes a loss for each member.  Yields those made, (N,)."""
    losses: list[Tensor] = []
    if not members.labelled or not isinstance(getattr(type(model), "loss_function", None), property):
        yield losses
        return
    own, function = model.__dict__.get("_loss_function"), model.loss_function

    def each(*args: Any, **kwargs: Any) -> Tensor:
        calls, _ = members.split(args, kwargs)
        losses.append(torch.stack([function(*own_args, **named) for own_args, named in calls]))
        return losses[-1]

    model.loss_function = each
    try:
        yield losses
    finally:
        del model._loss_function
        if own is not None:
            model.loss_function = own
