"""Probing of weights that are spread over ranks: the pieces move before the forward gathers them.

    in place   as of whole weights (`inplace.py`): fp32
    scratch    the pieces' values are put aside, the displaced ones stand in their place for one forward, and the values
               come back: theta is the same to the bit after any probe.  It takes the memory of a rank's pieces once
               more, and three passes over them; the forward has gathered all of them meanwhile.

Around every probe the model is resharded: FSDP2 keeps what its root module has gathered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zo_finetuner.errors import InputError
from zo_finetuner.inplace import InPlaceProbing
from zo_finetuner.optim.base import Method, Probe
from zo_finetuner.scratch import ScratchProbing
from zo_finetuner.shards import ShardBlocks, reshard


class ShardedInPlace(InPlaceProbing):
    def __init__(self, model: nn.Module, blocks: ShardBlocks):
        super().__init__(model, blocks)
        self._model = model

    @contextlib.contextmanager
    def at(self, probe: Probe, following: Sequence[Probe] = ()) -> Iterator[None]:
        reshard(self._model)
        try:
            with super().at(probe, following):
                yield
        finally:
            reshard(self._model)


class ShardedScratch(ScratchProbing):
    settled, grown = True, 0

    def __init__(self, model: nn.Module, blocks: ShardBlocks):
        self.model, self.blocks = model, blocks
        self._nearest_above = torch.empty(len(blocks), dtype=torch.float32, device=blocks.device)
        self._aside: list[Tensor] = []
        self.measure()

    def _largest(self) -> Tensor:
        largest = super()._largest()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.blocks.group)
        return largest

    @contextlib.contextmanager
    def at(self, probe: Probe, following: Sequence[Probe] = ()) -> Iterator[None]:
        reshard(self.model)
        self._probe, own = probe, self.blocks.tensors
        if not self._aside:
            self._aside = [torch.empty_like(tensor) for tensor in own]
        for kept, tensor in zip(self._aside, own, strict=True):
            kept.copy_(tensor)
        try:
            if probe.direction is not None:
                for block, tensor in enumerate(own):
                    self._write(self._aside[block], tensor, block)
            yield
        finally:
            reshard(self.model)
            for kept, tensor in zip(self._aside, own, strict=True):
                tensor.copy_(kept)


def make_sharded_probing(
    mode: str, model: nn.Module, blocks: ShardBlocks, method: Method
) -> ShardedInPlace | ShardedScratch:
    """As `probing.make_probing`.  InputError for what needs whole tensors."""
    if method.whole_only:
        raise InputError(f"{method.name} does not go with sharded weights: {method.whole_only}")
    if mode == "paired":
        raise InputError("probing paired does not go with sharded weights: use scratch")
    if mode == "auto":
        mode = "inplace" if all(t.dtype == torch.float32 for t in blocks.tensors) and not method.scratch_only else ""
    return ShardedInPlace(model, blocks) if mode == "inplace" else ShardedScratch(model, blocks)
