"""A model call that was evaluated for both signs: what it was given, and the - half of what it returned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

COMPARED_AT_ONCE = ("cpu",)  # devices on which looking at a value waits for nothing


class Call:
    """Holds the inputs (no copies, but for inference tensors, which count no versions) and the outputs `minus`."""

    def __init__(self, inputs: Any, minus: Any):
        leaves, self._spec = tree_flatten(inputs)
        self._leaves = [_kept(leaf) for leaf in leaves]
        self._minus = minus

    def answer(self, inputs: Any) -> tuple[bool, Any]:
        """(True, the - half) if a call with these inputs is this call again: the same tensors, unwritten since, or
        equal ones.  (False, None) otherwise.

        Equal tensors on a GPU are compared there, without a wait: where they turn out to differ, the answer is NaN and
        the step is skipped."""
        leaves, spec = tree_flatten(inputs)
        if spec != self._spec:
            return False, None
        differ: list[Tensor] = []
        if not all(_same(leaf, *kept, differ) for leaf, kept in zip(leaves, self._leaves, strict=True)):
            return False, None
        if not differ:
            return True, self._minus
        wrong = torch.stack(differ).any()
        return True, tree_map(lambda leaf: _unless(wrong, leaf), self._minus)


def _kept(value: Any) -> tuple[Any, int | None]:
    if not isinstance(value, Tensor):
        return value, None
    return (value.clone(), None) if value.is_inference() else (value, value._version)


def _same(value: Any, kept: Any, version: int | None, differ: list[Tensor]) -> bool:
    if not isinstance(kept, Tensor):
        return type(value) is type(kept) and value == kept
    if version is not None and kept._version != version:
        return False
    if value is kept:
        return True
    if not isinstance(value, Tensor) or _form(value) != _form(kept):
        return False
    if value.device.type in COMPARED_AT_ONCE:
        return torch.equal(value, kept)
    differ.append((value != kept).any())
    return True


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _unless(wrong: Tensor, leaf: Any) -> Any:
    return torch.where(wrong, torch.nan, leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
