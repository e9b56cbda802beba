"""Some of the blocks, and directions as those need them: vectors beside the matrices of low-rank directions."""

from __future__ import annotations

import torch
from torch import Tensor

from zo_finetuner.optim.directions import Direction, Terms
from zo_finetuner.subspace import Held
from zo_finetuner.update import apply_terms
from zo_kernels import Blocks, add_product


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

    def move(self, terms: Terms, decay: Tensor | None, rounding_seed: Tensor) -> None:
        """The update of these blocks by terms of all."""
        if not self.numbers or not terms:
            return
        held, coef = terms[0]
        if not isinstance(held, Held):
            return apply_terms(self.blocks, self.terms(terms), decay, rounding_seed)
        parts = held.dense.split(self.blocks.numels)
        for theta, dense, tensor_id in zip(self.blocks.tensors, parts, self.blocks.ids, strict=True):
            row = theta.view(1, -1)
            add_product(row, coef.view(1, 1), dense.view(1, -1), tensor_id, rounding_seed, decay=decay)

    def _scale(self, scale: Tensor | None) -> Tensor | None:
        if scale is None:
            return None
        if scale not in self._of:
            self._of = {scale: scale.index_select(0, self.places)}
        return self._of[scale]
