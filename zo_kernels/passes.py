"""Several updates of the same weights as as many passes over them: what `replay_` means."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from zo_kernels.blocks import Blocks


def one_by_one(
    axpy_: Callable[..., None],
    blocks: Blocks,
    seeds: Tensor,
    coefs: Tensor,
    scale: Tensor | None,
    passes: Sequence[int],
    decays: Tensor | None,
    rounding_seeds: Tensor | None,
    stochastic: Sequence[bool],
    dist: str,
) -> None:
    """axpy_: of a backend."""
    first = 0
    for p, count in enumerate(passes):
        these = slice(first, first + count)
        first += count
        own = scale[these] if scale is not None and scale.dim() == 2 else scale
        decay = None if decays is None else decays[p]
        rounding = rounding_seeds[p] if stochastic[p] else None
        axpy_(blocks, seeds[these], coefs[these], own, decay, rounding, dist, None)
