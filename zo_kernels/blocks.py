"""The tensors that a direction touches.  A block is one named parameter tensor: its storage, its 32-bit tensor id
and the global index of its first element.  Ops take a `Blocks`, so that one call (one launch) covers a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from zo_kernels.noise import tensor_ids

_DTYPE_OF = attrgetter("dtype")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class BlockStats(NamedTuple):
    """Statistics of every block: vectors of one value per block.  mean, var (unbiased; 0 for one element) and norm
    (Euclidean) are fp32, accumulated across chunks in fp64, and NaN in a block that has a non-finite element;
    nonfinite (int64) counts those.  An empty block has mean NaN, var 0 and norm 0."""

    mean: Tensor
    var: Tensor
    norm: Tensor
    nonfinite: Tensor

    @classmethod
    def empty(cls, count: int, device: torch.device) -> BlockStats:
        """Uninitialised, for an op to fill."""
        floats = (torch.empty(count, dtype=torch.float32, device=device) for _ in range(3))
        return cls(*floats, torch.empty(count, dtype=torch.int64, device=device))


class Blocks:
    """An ordered list of named floating tensors; where they lie on several devices (`parts`), ops take their scalars on
    the first one's.

    named: (name, tensor) pairs; the tensors are held, not copied, and written in place by the ops.
    ids: name -> tensor id (uint32), e.g. read from a journal; computed from the names when not given.
    offsets: per block, the global index of the tensor's first element (a shard of a larger tensor); default 0.
    whole: per block, how many elements that larger tensor has; default those of the tensor.

    Raises ValueError naming the tensor: not floating (int8 bases train adapters instead), on meta among others, listed
    twice, sharing its memory with another block (tie them to one name first), an expanded view, or without its storage.
    Every op checks again (`refresh`) when a tensor has moved since.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        ids: Mapping[str, int] | None = None,
        offsets: Sequence[int] | None = None,
        whole: Sequence[int] | None = None,
    ):
        pairs = list(named)
        self.names = [name for name, _ in pairs]
        self.tensors = [tensor for _, tensor in pairs]
        ids = tensor_ids(self.names) if ids is None else ids
        self.ids = [ids[name] for name in self.names]
        self.offsets = list(offsets) if offsets is not None else [0] * len(pairs)
        self.numels = [tensor.numel() for tensor in self.tensors]
        self.whole = list(whole) if whole is not None else self.numels
        self.addresses: tuple[int, ...] = ()
        self._forms: list[object] = []  # strides, sizes and dtypes
        self.states_apart: tuple[tuple[int, ...], tuple[int, ...]] = (), ()  # addresses known not to overlap
        self.refresh()
        self.index = {name: i for i, name in enumerate(self.names)}

    def __getstate__(self) -> dict:
        """A copy or a pickle has tensors of its own, so none of the tables that backends keep here."""
        return {**{k: v for k, v in self.__dict__.items() if not k.endswith(("_table", "_tables"))}, "addresses": ()}

    def refresh(self) -> tuple[int, ...]:
        """The tensors' addresses, checked again if any has changed, or a stride (`param.data = ...`, `module.to()`, a
        storage freed by a sharding wrapper) or a dtype or size, which may come to the same address.  The same tuple
        object as long as nothing changed: backends key their tables on it.  0.3 us a tensor."""
        addresses = tuple(map(Tensor.data_ptr, self.tensors)) if self.device.type != "meta" else ()
        forms = [*map(Tensor.stride, self.tensors), *map(Tensor.numel, self.tensors), *map(_DTYPE_OF, self.tensors)]
        if not addresses or addresses != self.addresses or forms != self._forms:
            self._check()
            self.addresses, self._forms = addresses, forms
        return self.addresses

    def _check(self) -> None:
        if len(set(self.names)) != len(self.names):
            twice = next(n for n in self.names if self.names.count(n) > 1)
            raise ValueError(f"block {twice!r} is listed twice")
        spans: dict[torch.device, list[tuple[int, int, str]]] = {}
        for name, tensor, numel in zip(self.names, self.tensors, self.numels, strict=True):
            if tensor.dtype not in DTYPES:
                raise ValueError(
                    f"{name} is {str(tensor.dtype).removeprefix('torch.')}: zeroth-order steps need a float32, "
                    f"bfloat16 or float16 tensor; freeze it, or train an adapter"
                )
            if tensor.is_meta != self.tensors[0].is_meta:
                raise ValueError(f"{name} is on {tensor.device}, {self.names[0]} on {self.tensors[0].device}")
            if tensor.numel() != numel:
                raise ValueError(f"{name} has {tensor.numel()} elements now, {numel} when it was listed: list it again")
            if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
                raise ValueError(f"{name} repeats its elements (an expanded view): pass the tensor that it expands")
            if tensor.numel() and tensor.device.type != "meta":
                spans.setdefault(tensor.device, []).append((*_memory_span(tensor, name), name))
        for of_device in spans.values():
            require_apart(of_device, ": pass a tied tensor once, under one name")

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device if self.tensors else torch.device("cpu")

    def __len__(self) -> int:
        return len(self.tensors)


def place_of(tensor: Tensor) -> object:
    """What tensors of one call have in common."""
    return tensor.device


def _memory_span(tensor: Tensor, name: str) -> tuple[int, int]:
    """First and one past the last byte that a tensor's elements occupy.  ValueError naming a tensor whose storage is
    too small for it (freed by a sharding wrapper, say): a kernel would read foreign memory."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    bytes_needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    if tensor.untyped_storage().nbytes() < bytes_needed:
        raise ValueError(f"{name} has lost its storage (freed or resized): gather or reload it before this call")
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def require_apart(spans: list[tuple[int, int, str]], mend: str = "") -> None:
    """spans: (first byte, one past the last, name).  ValueError naming two that overlap, and the mend."""
    spans.sort()
    for (_, end, name), (start, _, other) in zip(spans, spans[1:], strict=False):
        if start < end:
            raise ValueError(f"{name} and {other} share memory{mend}")
