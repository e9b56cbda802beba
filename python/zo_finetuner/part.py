"""Some of the blocks, and directions as those need them: vectors beside the matrices of low-rank directions."""

from __future__ import annotations

import torch
from torch import Tensor

from zo_finetuner.optim.directions import Direction, Terms
from zo_kernels import Blocks


class Part:
    """Some of the blocks, by their numbers, and directions with the scales of those."""

    def __init__(self, blocks: Blocks, numbers: list[int]):
        self.numbers = numbers
        self.places = torch.tensor(numbers, dtype=torch.int64, device=blocks.device)
        self.ids = {blocks.names[b]: blocks.ids[b] for b in numbers}
        self.blocks = Blocks([(blocks.names[b], blocks.tensors[b]) for b in numbers], ids=self.ids)
        self._of: dict[Tensor, Tensor] = {}  # a scale of all blocks -> of these, the last one

    def copies(self) -> Blocks:
        return Blocks([(n, t.clone()) for n, t in zip(self.blocks.names, self.blocks.tensors, strict=True)], self.ids)

    def terms(self, terms: Terms) -> Terms:
        return [(Direction(d.seed, self._scale(d.scale), d.dist), coef) for d, coef in terms]

    def _scale(self, scale: Tensor | None) -> Tensor | None:
        if scale is None:
            return None
        if scale not in self._of:
            self._of = {scale: scale.index_select(0, self.places)}
        return self._of[scale]
