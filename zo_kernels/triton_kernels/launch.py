"""What every launch of a Triton kernel shares: tile sizes, the device, the two stages of a reduction."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from zo_kernels.blocks import BlockStats
from zo_kernels.triton_kernels.noise import HARDWARE
from zo_kernels.triton_kernels.statistics import statistics_kernel

BLOCK = 2048  # elements per tile: two 16-byte accesses of a 16-bit dtype per thread, 40 to 80 registers
UPDATE_BLOCK = 1024  # of update_scratch_: four Philox calls per 8 elements took 117 registers at 2048, take 72
STATE_BLOCK = 1024  # of update_state_: theta and three states
CHUNK = 1 << 16  # elements per program of a list: 458,000 chunks for 30B parameters, a table of 7.3 MB
SPAN = 1 << 14  # elements per program of scratch: a 4096 x 4096 matrix has 1,024 programs, for 132 processors
LANES = 256  # chunks that the second stage of a reduction reads at a time
# Contraction off: the contract's one fma is written out, and nothing else may be fused.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
IN_REGISTERS = 2  # directions held in registers; more are read again for every tile


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Launch on the tensors' own device.  ValueError for CPU tensors, which only the interpreter can take."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    if HARDWARE.value:
        raise ValueError(
            f"the triton backend needs cuda tensors, got {device}: use_backend('reference'), or set "
            f"TRITON_INTERPRET=1 before Triton is imported"
        )
    return contextlib.nullcontext()


def partial_sums(chunks: int, stats: BlockStats | None, device: torch.device) -> Tensor | None:
    """For the sums of each chunk, which `finish` reads."""
    return None if stats is None else torch.empty((chunks, 4), dtype=torch.float64, device=device)


def finish(stats: BlockStats | None, partial: Tensor | None, blocks: Tensor | None) -> None:
    """The second stage of statistics."""
    if stats is not None:
        grid = (len(stats.mean),)
        statistics_kernel[grid](partial, blocks, len(partial), *stats, LANES=LANES, **OPTIONS)


def held(count: int) -> int:
    """How many directions a kernel holds in registers: all, or none."""
    return count if count <= IN_REGISTERS else 0


def stride(scale: Tensor | None, one: int) -> int:
    """From one direction's scales to the next's; `one` is the rank of a scale that serves them all."""
    return 0 if scale is None or scale.dim() == one else scale.stride(0)
