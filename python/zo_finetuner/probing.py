"""How a loss is evaluated away from theta: in place, or through a scratch that leaves theta alone.

    in place   theta += (c' - c) * scale_b * z_b between probes; the way back merges with the update.
               Right for fp32 weights and adapters.  16-bit weights drift: +eps, -2 eps, +eps in bf16 moves 45 % of
               them at every step, by 12 % of their norm in 1,000 steps.
    scratch    module by module, just in time: a forward pre-hook writes theta + c * scale_b * z_b into a reusable
               stack and swaps the parameter's storage, an always-called forward hook swaps it back.  theta is never
               written: `torch.equal` after any number of probes, after an exception, after Ctrl-C.

Both (`inplace.py`, `scratch.py`) are used as `with probing.at(probe): loss = ...`, then `apply()` or `restore()`.
"""

from __future__ import annotations

import torch
from torch import nn

from zo_finetuner.inplace import InPlaceProbing
from zo_finetuner.scratch import ScratchProbing
from zo_kernels import Blocks

MODES = ("auto", "scratch", "inplace")


def make_probing(mode: str, model: nn.Module, blocks: Blocks) -> InPlaceProbing | ScratchProbing:
    """mode "auto": scratch where any trainable weight has 16 bits, else in place."""
    if mode not in MODES:
        raise ValueError(f"unknown probing {mode!r}; there are: {', '.join(MODES)}")
    if mode == "auto":
        mode = "scratch" if any(t.dtype != torch.float32 for t in blocks.tensors) else "inplace"
    return ScratchProbing(model, blocks) if mode == "scratch" else InPlaceProbing(model, blocks)
