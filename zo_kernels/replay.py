"""`replay_`: many updates of the same weights in one pass, each rounded by itself; the bits of as many `update_`.

Bytes moved per element: those of one update.  A step is as many passes as the run made (one, or with probes in place
the ways there and back too), and a pass is one or several directions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_kernels.arguments import require, require_directions
from zo_kernels.blocks import Blocks
from zo_kernels.dispatch import backend
from zo_kernels.parts import parts_of


@torch.no_grad()
def replay_(
    blocks: Blocks,
    seeds: Tensor,
    coefs: Tensor,
    scale: Tensor | None = None,
    *,
    passes: Sequence[int],
    decays: Tensor | None = None,
    rounding_seeds: Tensor | None = None,
    stochastic: Sequence[bool] | None = None,
    dist: str = "normal",
) -> None:
    """For every pass p in order: theta_b = round(decays[p] * theta_b + sum over its directions coefs[k] * scale_kb *
    z_kb), as `update_` has it.

    seeds: (N,) int64; coefs: (N,) fp32; scale: (len(blocks),) fp32, (N, len(blocks)) or None: those of all passes, one
    behind the other.  passes: how many directions each has, at least one.  decays: (P,) fp32 or None; rounding_seeds:
    (P,) int64 or None to round to nearest; stochastic: whether each pass rounds by its seed, None: all do.  fp32
    weights are never rounded again.  ValueError naming the argument, before any weight is touched."""
    blocks.refresh()
    require_directions(seeds, coefs, scale, (len(blocks),), blocks.device, dist)
    if min(passes, default=0) < 1 or sum(passes) != len(seeds):
        raise ValueError(f"passes must be positive and add up to the {len(seeds)} seeds, got {list(passes)[:8]}")
    if stochastic is not None and len(stochastic) != len(passes):
        raise ValueError(f"stochastic must be {len(passes)} long, got {len(stochastic)}")
    for name, values, dtype in (("decays", decays, torch.float32), ("rounding_seeds", rounding_seeds, torch.int64)):
        if values is not None:
            require(values, name, dtype, (len(passes),), blocks.device)
    stochastic = [rounding_seeds is not None] * len(passes) if stochastic is None else list(stochastic)
    if any(stochastic) and rounding_seeds is None:
        raise ValueError("a pass that rounds stochastically needs rounding_seeds")
    parts = parts_of(blocks)
    if parts:
        for part in parts:
            replay_(part.blocks, part.sent(seeds), part.sent(coefs), part.chosen(scale), passes=passes,
                    decays=part.sent(decays), rounding_seeds=part.sent(rounding_seeds), stochastic=stochastic,
                    dist=dist)  # fmt: skip
        return
    if decays is None and all(tensor.dtype == torch.float32 for tensor in blocks.tensors):
        # Nothing is rounded and nothing shrinks between the passes: one sum.
        backend(blocks.device.type).axpy_(blocks, seeds, coefs, scale, None, None, dist, None, None)
        return
    backend(blocks.device.type).replay_(
        blocks, seeds, coefs, scale, list(passes), decays, rounding_seeds, stochastic, dist
    )
