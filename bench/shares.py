"""Where the time of a step goes: every phase's share of it, and a profiler's trace.

The clock is read where a phase begins or ends, and the time between two readings is of the innermost phase: the host's
clock on a CPU, events on the stream on a GPU, so that a phase has the time of its kernels and of the gaps between them.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.providers import Batch, Step
from zo_finetuner import phases
from zo_finetuner.scratch import ScratchProbing

PHASES = ("ask", "probe", "forward", "loss", "tell", "update", "other")


class Marks:
    """Stands for `record_function` while steps are recorded."""

    def __init__(self, device: torch.device):
        self._gpu = device.type == "cuda"
        self._marks: list[tuple[float | torch.cuda.Event, str]] = []  # a reading, and the phase that it begins
        self._open: list[str] = []

    @contextlib.contextmanager
    def __call__(self, label: str) -> Iterator[None]:
        self._open.append(label.removeprefix("zo."))
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def _mark(self) -> None:
        if self._gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((now, self._open[-1] if self._open else ""))

    def spent(self) -> dict[str, float]:
        """Phase -> time within it and no phase inside it; what is outside of all is left out."""
        if self._gpu:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (start, name), (end, _) in zip(self._marks, self._marks[1:], strict=False):
            if name:
                found[name] = found.get(name, 0.0) + (start.elapsed_time(end) if self._gpu else end - start)
        return found


def phase_shares(step: Step, batches: Sequence[Batch], device: torch.device) -> dict[str, float]:
    """Phase -> its share of the steps' time.  A scratch is written inside of forwards and counted as probe."""
    marks = Marks(device)
    write = mock.patch.object(ScratchProbing, "_write", _as_probe(ScratchProbing._write))
    with mock.patch.object(phases, "record_function", marks), write:
        for batch in batches:
            with phases.phase("other"):
                step(batch)
    spent = marks.spent()
    total = sum(spent.values())
    return {name: spent.get(name, 0.0) / total for name in PHASES}


def _as_probe(write: Callable) -> Callable:
    @functools.wraps(write)
    def written(*args, **kwargs):
        with phases.phase("probe"):
            return write(*args, **kwargs)

    return written


def write_trace(step: Step, batch: Batch, path: Path, device: torch.device) -> None:
    """One step as torch.profiler sees it, for Perfetto or chrome://tracing.  The step must have run before."""
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu) as recorded:
        with record_function("zo.step"):
            step(batch)
        if gpu:
            torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(path))
