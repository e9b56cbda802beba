"""Measures calls one by one: a row as soon as there is one, on with the next after a failure, an end to the time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.rows import append, machine, spread
from bench.timing import clock


class BudgetSpent(Exception):
    """Raised instead of a measurement that would begin after the last second; names it."""


class Runner:
    """device: of the tensors; ours: the backend that runs all ops; stats: those that run block_stats, best first;
    repeats: of every measurement; budget: seconds from now, None for no end.

    bandwidth: floor ("copy" or "read") -> bytes/s, filled when those two cases are timed."""

    def __init__(
        self,
        path: Path,
        device: torch.device,
        ours: str,
        stats: Sequence[str],
        repeats: int = 21,
        budget: float | None = None,
    ):
        self.path, self.device, self.ours, self.stats, self.repeats = path, device, ours, tuple(stats), repeats
        self.clock = clock(device)
        self.end = None if budget is None else time.monotonic() + budget
        self.bandwidth: dict[str, float] = {}
        self.failed: list[str] = []
        self.label: dict[str, Any] = {}  # extra keys of all rows within `about`

    @contextlib.contextmanager
    def about(self, **label: Any) -> Iterator[None]:
        """Rows of these measurements carry these keys (model, tensor)."""
        before, self.label = self.label, self.label | label
        try:
            yield
        finally:
            self.label = before

    @contextlib.contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """A failure inside is told, counted and left behind, unless the device is lost with it."""
        if self.end is not None and time.monotonic() > self.end:
            raise BudgetSpent(what)
        try:
            yield
            return
        except BudgetSpent:
            raise
        except Exception as error:
            self.failed.append(what)
            print(f"FAILED {what}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}", flush=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # raises again where the device is lost
            torch.cuda.empty_cache()  # what the failure's frames held

    def record(
        self, case: str, provider: str, dtype: torch.dtype, n: int, values: Sequence[float], metric: str, unit: str,
        **extra: Any,
    ) -> None:  # fmt: skip
        row = {"case": case, "provider": provider, "dtype": str(dtype).removeprefix("torch."), "n": n}
        row |= {"metric": metric, "unit": unit} | spread(list(values)) | self.label | extra
        append(self.path, row | machine(self.device.type))
        label = next(iter(self.label.values()), "")
        value = f"{row['p50'] * 1e3:>11.4f} ms" if unit == "s" else f"{row['p50']:>11.4g} {metric}"
        share = f"   {extra['share']:.3f} of {extra['floor']}" if "share" in extra else ""
        print(f"{case:<22}{provider:<10}{row['dtype']:<10}{label:<28}{value}{share}", flush=True)

    def time(
        self,
        case: str,
        provider: str,
        dtype: torch.dtype,
        n: int,
        run: Callable[[], object],
        *,
        moved: int | None = None,
        floor: str = "copy",
        calls: int = 1,
        host: bool = False,
    ) -> float | None:
        """Median seconds of a call; None where it failed.  moved: the bytes it must move, which gives the row its share
        of the `floor`'s bandwidth; calls: how many ops `run` does; host: until the call returns, not until it is
        done."""
        with self.guard(f"{case} ({provider}, {dtype})"):
            measure = self.clock.host if host else self.clock.measure
            seconds = [value / calls for value in measure(run, self.repeats)]
            median = spread(seconds)["p50"]
            extra: dict[str, Any] = {} if moved is None else {"bytes": moved}
            if moved is not None and case in ("copy", "read"):
                self.bandwidth[case] = moved / median
            elif moved is not None and floor in self.bandwidth:
                extra |= {"share": moved / median / self.bandwidth[floor], "floor": floor}
            self.record(case, provider, dtype, n, seconds, "time_s", "s", **extra)
            return median
        return None
