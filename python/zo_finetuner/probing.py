"""How a loss is evaluated away from theta: in place, or through a scratch that leaves theta alone.

    in place   theta += (c' - c) * scale_b * z_b between probes; the way back merges with the update.
               Right for fp32 weights and adapters.  16-bit weights drift: +eps, -2 eps, +eps in bf16 moves 45 % of
               them at every step, by 12 % of their norm in 1,000 steps.
    scratch    module by module, just in time: a forward pre-hook writes theta + c * scale_b * z_b into a reusable
               stack and swaps the parameter's storage, an always-called forward hook swaps it back.  theta is never
               written: `torch.equal` after any number of probes, after an exception, after Ctrl-C.
    paired     a scratch for each sign, made in one pass, and one forward of a doubled batch for both.
    lowrank    low-rank directions as side products of the forward, of short batches all probes in one; updates are
               collected and merged rarely.  It goes with the methods that have such directions, and is not asked for.

All (`inplace.py`, `scratch.py`, `paired.py`, `lowrank.py`) are used as `with probing.at(probe, following): loss = ...`,
then `apply()` or `restore()`.
"""

from __future__ import annotations

import torch
from torch import nn

from zo_finetuner.errors import InputError
from zo_finetuner.inplace import InPlaceProbing
from zo_finetuner.lowrank import LowRankProbing
from zo_finetuner.optim.base import Method
from zo_finetuner.paired import PairedProbing
from zo_finetuner.scratch import ScratchProbing
from zo_finetuner.sharded_probing import make_sharded_probing
from zo_finetuner.shards import ShardBlocks
from zo_finetuner.slices import slicing
from zo_kernels import Blocks, parts_of

PROBINGS = {kind.mode: kind for kind in (ScratchProbing, PairedProbing, InPlaceProbing)}
MODES = ("auto", *PROBINGS)


def require_goes(mode: str, method: Method) -> None:
    """InputError for a mode in which a method cannot be probed."""
    if method.low_rank and mode != "auto":
        raise InputError(f"{method.name} probes by side products of the forward, not {mode}: leave probing auto")
    if mode == "inplace" and method.scratch_only:
        raise InputError(f"probing inplace does not go with this method: {method.scratch_only}; use --probing scratch")


def make_probing(
    mode: str, model: nn.Module, blocks: Blocks, method: Method | None = None
) -> InPlaceProbing | ScratchProbing:
    """mode "auto": what the method asks for, else scratch where any trainable weight has 16 bits, else in place.
    method: None for one that can be probed in every way.  Paired probing doubles activations and is asked for by name:
    on a CPU (16 prompts of SST-2, 6M weights) a step takes .92 of scratch's, padded 1.0.  Raises InputError."""
    if mode not in MODES:
        raise ValueError(f"unknown probing {mode!r}; there are: {', '.join(MODES)}")
    method = Method() if method is None else method
    require_goes(mode, method)
    slicing(model)  # tried before a prober hooks the model: a whole head would grow its scratch
    if isinstance(blocks, ShardBlocks):
        return make_sharded_probing(mode, model, blocks, method)
    if method.low_rank and parts_of(blocks):
        raise InputError(f"{method.name} does not go with weights on several devices: its factors are one vector")
    if method.low_rank:
        return LowRankProbing(model, blocks)
    if mode == "auto":
        any_16 = any(t.dtype != torch.float32 for t in blocks.tensors)
        mode = "scratch" if method.scratch_only or any_16 else "inplace"
    return PROBINGS[mode](model, blocks)
