"""What a CUDA graph cannot hold: operators that make the host look at what is on the device.

    waits     `.item()`, `if tensor`, `torch.equal`: a value decides what the host does next
    sizes     `nonzero`, `unique`, a boolean index: a value decides how large a result is
    sends     `torch.tensor(...)`, `.to(device)`: a value of the host, which a graph would repeat for ever

An eager step under `CaptureCheck` names the first of them before anything is captured, so that a capture is only begun
where it will succeed: one that fails leaves torch's allocator and stream in a state nobody wants.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITS, _SIZES = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape
_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


def obstacle(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> str:
    """Why a graph cannot hold this operator with these arguments; empty where it can."""
    if func._overloadpacket in _INDEXING:
        masks = (torch.bool, torch.uint8)
        return "a boolean index" if any(t.dtype in masks for t in _tensors(args[1])) else ""
    if _WAITS in func.tags:
        return "the host waits for a value"
    if _SIZES in func.tags:
        return "the size of its result depends on values"
    if func is torch.ops.aten.lift_fresh.default and args[0].numel():
        return "a tensor of values from the host"
    if func._overloadpacket is torch.ops.aten.copy_ and args[0].device.type != args[1].device.type:
        return "values go between host and device"
    if func is torch.ops.aten._to_copy.default and "device" in kwargs:
        device = kwargs["device"]
        if device is not None and torch.device(device).type != args[0].device.type:
            return "values go between host and device"
    return ""


def _tensors(values: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


class CaptureCheck(TorchDispatchMode):
    """Within it everything runs as ever.  found: the first operator that a graph cannot hold, why, and the line of code
    that calls it; empty while there is none."""

    found = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        reason = "" if self.found else obstacle(func, args, kwargs)
        if reason:
            self.found = f"{func} ({reason}) in {_caller()}"
        return func(*args, **kwargs)


def _caller() -> str:
    """The innermost line outside torch and this file, as "folder/file.py:line"."""
    inside = (os.path.dirname(torch.__file__) + os.sep, __file__)
    frames = [f for f in traceback.extract_stack() if not f.filename.startswith(inside)]
    return f"{os.sep.join(frames[-1].filename.split(os.sep)[-2:])}:{frames[-1].lineno}"
