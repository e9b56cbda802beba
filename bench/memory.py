"""Peak memory of a provider, weights included, measured by the allocator that serves it.

On a GPU the caching allocator's own maximum.  On a CPU the process's size tells little (the libraries take ten times
what a small model does, and glibc keeps what was freed), so torch's CPU allocator is asked: its profiler reports every
block taken and given back, operators' temporaries included.  The model is copied while it reports, so that the sum
begins at nothing.  Buffers that a library takes by itself (oneDNN's packed weights) are not seen.
"""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile

from bench.providers import Batch, Provider, Setup


def peak_bytes(provider: Provider, setup: Setup, batches: Sequence[Batch], device: torch.device) -> int:
    """Largest sum of tensors alive during a provider's first steps, one on each batch: weights, all that the provider
    keeps, temporaries.  On a GPU whatever else is allocated counts, so nothing else should be."""
    _collect(device)  # an engine that is gone must not hold weights that are replaced now
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        _steps(provider, setup, batches)
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        _steps(provider, replace(setup, model=copy.deepcopy(setup.model)), batches)
    events = [(e.start_ns(), e.nbytes()) for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for _, size in sorted(events):
        alive += size
        peak = max(peak, alive)
    return peak


def _steps(provider: Provider, setup: Setup, batches: Sequence[Batch]) -> None:
    step = provider.make(setup)
    for batch in batches:
        step(batch)


def _collect(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def capacity(device: torch.device) -> int:
    """Bytes of memory that the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
