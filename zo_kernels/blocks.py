"""The tensors that a direction touches.  A block is one named parameter tensor: its storage, its 32-bit tensor id
and the global index of its first element.  Ops take a `Blocks`, so that one call (one launch) covers a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from zo_kernels.noise import tensor_ids

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Blocks:
    """An ordered list of named floating tensors on one device.

    named: (name, tensor) pairs; the tensors are held, not copied, and written in place by the ops.
    ids: name -> tensor id (uint32), e.g. read from a journal; computed from the names when not given.
    offsets: per block, the global index of the tensor's first element (a shard of a larger tensor); default 0.

    Raises ValueError naming the tensor: not floating (int8 bases train adapters instead), another device,
    listed twice, or sharing its memory with another block (tie them to one name first).
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        ids: Mapping[str, int] | None = None,
        offsets: Sequence[int] | None = None,
    ):
        pairs = list(named)
        self.names = [name for name, _ in pairs]
        self.tensors = [tensor for _, tensor in pairs]
        ids = tensor_ids(self.names) if ids is None else ids
        self.ids = [ids[name] for name in self.names]
        self.offsets = list(offsets) if offsets is not None else [0] * len(pairs)
        self.numels = [tensor.numel() for tensor in self.tensors]
        self._check()
        self.index = {name: i for i, name in enumerate(self.names)}

    def _check(self) -> None:
        if len(set(self.names)) != len(self.names):
            twice = next(n for n in self.names if self.names.count(n) > 1)
            raise ValueError(f"block {twice!r} is listed twice")
        spans = []
        for name, tensor in zip(self.names, self.tensors, strict=True):
            if tensor.dtype not in DTYPES:
                raise ValueError(
                    f"{name} is {str(tensor.dtype).removeprefix('torch.')}: zeroth-order steps need a float32, "
                    f"bfloat16 or float16 tensor; freeze it, or train an adapter"
                )
            if tensor.device != self.tensors[0].device:
                raise ValueError(f"{name} is on {tensor.device}, {self.names[0]} on {self.tensors[0].device}")
            if tensor.numel() and tensor.device.type != "meta":
                last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                start = tensor.data_ptr()
                spans.append((start, start + (last + 1) * tensor.element_size(), name))
        spans.sort()
        for (_, end, name), (start, _, other) in zip(spans, spans[1:], strict=False):
            if start < end:
                raise ValueError(f"{name} and {other} share memory: pass a tied tensor once, under one name")

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device if self.tensors else torch.device("cpu")

    def __len__(self) -> int:
        return len(self.tensors)
