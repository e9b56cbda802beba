"""What was learned for one model, for another depth or width of its family: a block takes what the nearest one has.

    nearest    of the same kind (`block_kinds.py`); of those with the same name but for the number of the layer, if
               there are any; of those at the least distance in relative depth, the first

A head that the artefact lacks (its model's was tied) takes what the embedding has.  PertNN networks and constant scales
go over as they are; a ScaleNet's inputs are those of the new blocks.  The normaliser is the new model's own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from zo_finetuner.block_kinds import block_kind, depths
from zo_finetuner.errors import InputError
from zo_finetuner.pertnn import PertNN
from zo_finetuner.scale_net import ScaleNet, static_inputs


def transferred(nets: PertNN | ScaleNet, names: Sequence[str], numels: Sequence[int]) -> PertNN | ScaleNet:
    """Networks or scales for blocks of these names and sizes, as a copy.  Raises InputError for a kind that the
    artefact does not have."""
    rows = torch.tensor(nearest_blocks(nets.names, names, nets.source), dtype=torch.long)
    if isinstance(nets, PertNN):
        return PertNN(names, *(p[rows] for p in (nets.w1, nets.b1, nets.w2, nets.b2)), source=nets.source)
    x, (log_base, kept) = static_inputs(names, numels), (nets.log_base[rows], nets.kept[rows])
    return ScaleNet(names, x, log_base, kept, nets.w1, nets.b1, nets.w2, source=nets.source)


def nearest_blocks(known: Sequence[str], wanted: Sequence[str], source: str) -> list[int]:
    """Place in `known` of the nearest block of each name in `wanted`."""
    kinds = [block_kind(name) for name in known]
    blocks = list(zip(map(_without_layer, known), depths(known), strict=True))

    def nearest(name: str, depth: float) -> int:
        kind = block_kind(name)
        if kind == "head" and kind not in kinds:
            kind = "embedding"
        same = [i for i, other in enumerate(kinds) if other == kind]
        if not same:
            has = ", ".join(dict.fromkeys(kinds))
            raise InputError(f"{source}: no block is of the kind of {name} ({kind}), there are {has}: learn it for "
                             "this model with `zo learn`")
        return min(same, key=lambda i: (blocks[i][0] != _without_layer(name), abs(blocks[i][1] - depth)))

    return [nearest(name, depth) for name, depth in zip(wanted, depths(wanted), strict=True)]


def _without_layer(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name, count=1)
