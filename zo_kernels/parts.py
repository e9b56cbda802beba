"""A list of tensors on several devices (`device_map`) as a list for each: ops over `Blocks` call themselves on these.

Seeds, coefficients and scales lie on the home device, that of the first tensor, and are sent to the others: some bytes
for a call and device, and no wait.  Noise does not depend on where a tensor lies, so neither does what an op computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zo_kernels.blocks import Blocks, BlockStats, place_of
from zo_kernels.forms import KINDS, Form


class Part(NamedTuple):
    """blocks: those of one device; index: their numbers in the whole list."""

    blocks: Blocks
    index: list[int]

    def sent(self, value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(self.blocks.device, non_blocking=True)

    def chosen(self, values: Tensor | None) -> Tensor | None:
        """Of (..., blocks) values those of the part."""
        return None if values is None else self.sent(values[..., self.index].contiguous())

    def of_list(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[i] for i in self.index]

    def formed(self, form: Form | None) -> Form | None:
        if form is None:
            return None
        state = None if form.state is None else self.of_list(form.state)
        value = self.chosen(form.value) if KINDS[form.kind].per_block else self.sent(form.value)
        return Form(form.kind, state, value)


def parts_of(blocks: Blocks) -> list[Part]:
    """One for each device, in the order of their first tensors; empty where all are on one."""
    made_for, parts = getattr(blocks, "parts_table", (None, None))
    if made_for is not blocks.addresses or parts is None:
        places: dict[object, list[int]] = {}
        for number, tensor in enumerate(blocks.tensors):
            places.setdefault(place_of(tensor), []).append(number)
        parts = [_part(blocks, index) for index in places.values()] if len(places) > 1 else []
        blocks.parts_table = blocks.addresses, parts
    return parts


def joined(parts: list[Part], stats: list[BlockStats], home: torch.device) -> BlockStats:
    """Those of the whole list from those of its parts."""
    order = torch.tensor([number for part in parts for number in part.index], device=home).argsort()
    return BlockStats(*(torch.cat([value.to(home) for value in values])[order] for values in zip(*stats, strict=True)))


def _part(blocks: Blocks, index: list[int]) -> Part:
    names = [blocks.names[i] for i in index]
    ids = {blocks.names[i]: blocks.ids[i] for i in index}
    offsets, whole = [blocks.offsets[i] for i in index], [blocks.whole[i] for i in index]
    return Part(Blocks(zip(names, (blocks.tensors[i] for i in index), strict=True), ids, offsets, whole), index)
