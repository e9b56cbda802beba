"""The first probe is watched: an operator that reads a trainable weight's own storage was missed by the hooks.

A module that reads its child's weight without calling the child (torch's MultiheadAttention does) would see the
unperturbed weight: its loss would not depend on the direction there, and the update would be pure noise.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator, Mapping, Set

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zo_kernels import Blocks


class UncoveredWeightError(RuntimeError):
    """A forward reads a trainable weight outside the module that owns it; names tensor and module."""


class CoverageCheck(TorchDispatchMode):
    """Raises UncoveredWeightError at the first operator that reads the memory of a block.

    Views read nothing and pass; what is done with them is checked.  `paused()` lets the probing's own reads through.
    homes: for the name of a block, those of modules that may read it."""

    def __init__(self, model: nn.Module, blocks: Blocks, homes: Mapping[str, Set[str]] | None = None):
        super().__init__()
        self._homes = homes or {}
        self._model = model
        spans = sorted(
            (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), name)
            for name, t in zip(blocks.names, blocks.tensors, strict=True)
        )
        self._starts = [start for start, _, _ in spans]
        self._spans = spans
        self._paused = False
        self._calls: list[str] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self):
        for name, module in self._model.named_modules():
            # prepend: the name must be on the list before the probing's own hook runs
            self._handles.append(module.register_forward_pre_hook(self._entering(name), prepend=True))
            self._handles.append(module.register_forward_hook(self._leaving, always_call=True))
        return super().__enter__()

    def _entering(self, name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            self._calls.append(name)

        return hook

    def _leaving(self, module: nn.Module, args: tuple, output: object) -> None:
        if self._calls:
            self._calls.pop()

    def __exit__(self, *exc):
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        return super().__exit__(*exc)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self._paused and not func.is_view:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and leaf.device.type != "meta" and leaf.numel():
                    self._check(leaf, func)
        return func(*args, **kwargs)

    def _check(self, tensor: Tensor, func) -> None:
        at = bisect.bisect_right(self._starts, tensor.data_ptr()) - 1
        if at >= 0 and tensor.data_ptr() < self._spans[at][1]:
            if self._calls and self._calls[-1] in self._homes.get(self._spans[at][2], ()):
                return
            where = (self._calls[-1] or type(self._model).__name__) if self._calls else "code outside the model"
            raise UncoveredWeightError(
                f"{self._spans[at][2]} is read by {func} in {where}, not by the module that owns it: a scratch probe "
                f"cannot reach it; use probing='inplace', or freeze that weight"
            )
