"""Every reader of files against broken and hostile ones: an answer or one line of InputError, soon, in little memory.

Inputs are valid files whose trees, numbers or bytes are broken (`mutations.py`), and some that stay whole.  `make test`
tries 500 for a reader, `make test-long` (ZO_LONG=1) 10,000, whose counts and times it adds to bench/results/fuzz.jsonl.
"""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from bounded import bounded, contents
from fuzzed import READERS, Reader
from hypothesis import HealthCheck, Phase, given, seed, settings

from bench.rows import ROOT, append, machine, spread
from zo_finetuner.errors import InputError
from zo_finetuner.reading import is_plain

LONG = bool(os.environ.get("ZO_LONG"))
SEED = int(os.environ.get("ZO_FUZZ_SEED", 0))
LONGEST = 2000  # characters of a message, paths included


@dataclass
class Tally:
    refused: int = 0
    accepted: int = 0
    seconds: list[float] = field(default_factory=list)


@pytest.fixture
def folder():
    """In memory where that is to be had: on a disk a file takes 4 ms, most of which is waiting."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with TemporaryDirectory(dir=memory) as name:
        yield Path(name)


@pytest.mark.parametrize("name", READERS)
def test_no_input_crashes_hangs_or_harms(name, folder):
    reader = READERS[name]
    count = 10_000 if LONG else 500 // reader.cost
    tally, began = Tally(), time.perf_counter()
    pristine = reader.prepare(folder)

    @seed(SEED)
    @settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    @given(reader.files)
    def once(files: dict[str, bytes]) -> None:
        written = pristine | files
        for file in files:
            (folder / file).write_bytes(files[file])
        try_one(reader, folder, tally)
        assert contents(folder) == written, "the folder was changed by reading it"

    once()
    assert len(tally.seconds) >= count and tally.refused > count / 10 and tally.accepted > count / 100
    if LONG:
        append(ROOT / "bench" / "results" / "fuzz.jsonl", row(name, tally, time.perf_counter() - began))


def try_one(reader: Reader, folder: Path, tally: Tally) -> None:
    before = time.thread_time()
    try:
        with bounded(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(folder)
        tally.accepted += 1
    except InputError as error:
        message = str(error)
        assert is_plain(message) and len(message) <= LONGEST, f"no line to show: {message[:300]!r}"
        assert str(folder) in message, f"names no file: {message}"
        tally.refused += 1
    tally.seconds.append(time.thread_time() - before)


def row(name: str, tally: Tally, seconds: float) -> dict:
    """A row of bench/results: seconds of the processor per input."""
    return {
        "case": "fuzz", "provider": name, "dtype": "", "n": len(tally.seconds), "metric": "time_s", "unit": "s",
        **spread(tally.seconds), "refused": tally.refused, "accepted": tally.accepted, "uncaught": 0,
        "slowest_s": max(tally.seconds), "seconds": seconds, "seed": SEED, **machine("cpu"),
    }  # fmt: skip
