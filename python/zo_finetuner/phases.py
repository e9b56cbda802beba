"""Named ranges around the phases of a step, for profilers: `torch.profiler` shows them on every machine (2 us each when
none is recording), Nsight Systems and Nsight Compute as NVTX ranges where torch was built with CUDA."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.profiler import record_function


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """`with phase("update"):` marks what runs inside as "zo.update"."""
    label = f"zo.{name}"
    nvtx = torch.cuda.nvtx.range(label) if torch.version.cuda else contextlib.nullcontext()
    with record_function(label), nvtx:
        yield
