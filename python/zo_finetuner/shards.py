"""Weights that are spread over ranks (FSDP2's `fully_shard`): each rank moves its own piece, by its own piece of the
noise.

A parameter is a DTensor that is sharded along its first dimension: what a rank holds of it are consecutive elements of
the whole, from an offset on.  Noise and rounding bits are functions of the global element index, so pieces put together
are the tensor that one process would have, to the last bit.  Statistics of a block are joined from its pieces'.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zo_finetuner.errors import InputError
from zo_kernels import Blocks, BlockStats, block_stats


class ShardBlocks(Blocks):
    """The pieces that this rank has.  group: the ranks over which they are spread."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]):
        """Raises InputError for a DTensor that is sharded in another way, ValueError as `Blocks`."""
        named = list(named)
        pieces = [_piece(name, parameter) for name, parameter in named]
        self.group = next(group for _, _, group in pieces if group is not None)
        names, numels = [name for name, _ in named], [parameter.numel() for _, parameter in named]
        tensors = [tensor for tensor, _, _ in pieces]
        super().__init__(zip(names, tensors, strict=True), None, [offset for _, offset, _ in pieces], numels)


def is_sharded(parameter: Tensor) -> bool:
    return hasattr(parameter, "placements")


def local(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter, without gradient: its storage."""
    return parameter.detach().to_local() if is_sharded(parameter) else parameter


def reshard(model: nn.Module) -> None:
    """Let go of whole parameters that FSDP2 keeps after a forward (the root's): the next forward gathers the pieces as
    they are then."""
    for module in model.modules():
        if hasattr(module, "set_reshard_after_forward"):
            module.reshard()


def stats_of(blocks: Blocks) -> BlockStats:
    """`zo_kernels.block_stats` of the whole tensors, to fp32 rounding: those of the pieces, joined in fp64 in the order
    of the ranks (Chan, Golub & LeVeque 1979)."""
    stats = block_stats(blocks)
    if not isinstance(blocks, ShardBlocks):
        return stats
    count = torch.tensor(blocks.numels, dtype=torch.float64, device=blocks.device)
    squares = stats.var.double() * (count - 1).clamp(min=0)
    mine = torch.stack((count, torch.where(count > 0, stats.mean.double(), 0.0), squares, stats.nonfinite.double()))
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(blocks.group))]
    dist.all_gather(parts, mine, group=blocks.group)
    total, mean, squares, nonfinite = parts[0].unbind()
    for count, other, more, bad in (part.unbind() for part in parts[1:]):
        together = total + count
        share = torch.where(together > 0, count / together, 0.0)
        delta = other - mean
        squares = squares + more + delta * delta * total * share
        mean, total, nonfinite = mean + delta * share, together, nonfinite + bad
    var = squares / (total - 1).clamp(min=1)
    joined = BlockStats(mean.float(), var.float(), (squares + total * mean * mean).sqrt().float(), nonfinite.long())
    spread = torch.tensor([a != b for a, b in zip(blocks.numels, blocks.whole, strict=True)], device=blocks.device)
    return BlockStats(*(torch.where(spread, new, own) for new, own in zip(joined, stats, strict=True)))


def _piece(name: str, parameter: nn.Parameter) -> tuple[Tensor, int, Any]:
    """(the local tensor, global index of its first element, the group it is spread over or None)."""
    if not is_sharded(parameter):
        return parameter.detach(), 0, None
    from torch.distributed.tensor import Replicate, Shard

    spread = [dim for dim, placement in enumerate(parameter.placements) if not isinstance(placement, Replicate)]
    if len(spread) > 1 or any(parameter.placements[dim] != Shard(0) for dim in spread):
        raise InputError(f"{name} is sharded as {parameter.placements}: shard it along its first dimension only, as "
                         "fully_shard does without shard_placement_fn")
    tensor = local(parameter)
    if not spread:
        return tensor, 0, None
    mesh, rows = parameter.device_mesh, parameter.shape[0]
    first = min(mesh.get_local_rank(spread[0]) * -(-rows // mesh.size(spread[0])), rows)
    return tensor, first * (parameter.numel() // max(rows, 1)), mesh.get_group(spread[0])
