"""Clocks.  A call on a GPU returns before its work is done, so device time is taken with events on the stream."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Run = Callable[[], object]
WARM_UP = 3  # compiles, builds tables, fills the allocator's cache


class HostClock:
    """Seconds of calls that are done when they return."""

    def measure(self, run: Run, repeats: int) -> list[float]:
        """Seconds of each of `repeats` calls, after a warm-up."""
        run()
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        return times

    host = measure

    def captured(self, run: Run) -> Run:
        """The same work in fewer launches, where the device has such a thing."""
        return run


class EventClock:
    """Seconds of work on the current CUDA stream."""

    def measure(self, run: Run, repeats: int) -> list[float]:
        """Device seconds of each of `repeats` calls.  All are enqueued before the first is read, so what the host
        does between two calls does not count as long as the device has work."""
        for _ in range(WARM_UP):
            run()
        pairs = [(_event(), _event()) for _ in range(repeats)]
        torch.cuda.synchronize()
        for start, end in pairs:
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in pairs]

    def host(self, run: Run, repeats: int) -> list[float]:
        """Seconds until each call returns, on an idle device."""
        for _ in range(WARM_UP):
            run()
        times = []
        for _ in range(repeats):
            torch.cuda.synchronize()
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        torch.cuda.synchronize()
        return times

    def captured(self, run: Run) -> Run:
        """A CUDA graph of the calls: small kernels without the host's time between them."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def clock(device: torch.device) -> HostClock | EventClock:
    return EventClock() if device.type == "cuda" else HostClock()
