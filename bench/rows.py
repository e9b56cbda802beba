"""One row of a benchmark: a JSON line that says what was measured, on what machine, with which versions and commit."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent

# What every row says.  n: elements (or rows of data); metric: `time_s` for durations; driver: "" without a GPU.
REQUIRED = {
    "case": str, "provider": str, "dtype": str, "n": int, "metric": str, "unit": str,
    "p20": float, "p50": float, "p80": float, "repeats": int,
    "device": str, "driver": str, "torch": str, "triton": str, "python": str,
    "commit": str, "dirty": bool, "date": str,
}  # fmt: skip
# Rows that agree in these measure the same thing: the newest one counts.
KEY = (
    "case", "provider", "dtype", "n", "metric", "device", "threads",
    "model", "tensor", "kernel", "task", "phase", "seed", "steps", "rate", "filled", "shrink",
    "network",
)  # fmt: skip


def machine(device: str) -> dict[str, Any]:
    """Device ("cpu" or "cuda"), versions and commit of this process, and the time: the same keys in all rows."""
    facts = {"device": _processor(), "threads": torch.get_num_threads(), "driver": ""}
    if device == "cuda":
        facts = {"device": torch.cuda.get_device_name(), "driver": _driver()}
    commit = _commit()
    return facts | {
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "commit": commit.removesuffix("-dirty"),
        "dirty": commit.endswith("-dirty"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def version(package: str) -> str:
    """"" when the package is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    """What a command prints, "" when it does not exist or fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout.strip()


@functools.cache
def _commit() -> str:
    """ZO_COMMIT names the commit of a copy that is no git checkout: `git describe --always --dirty` of its origin."""
    here = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*")
    return os.environ.get("ZO_COMMIT") or here or "unknown"


@functools.cache
def _driver() -> str:
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return driver.splitlines()[0] if driver else "unknown"


def _processor() -> str:
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{model}, {os.cpu_count()} cores"


def spread(values: list[float]) -> dict[str, float | int]:
    """p20, p50 and p80 of repeated measurements."""
    values = [float(value) for value in values]
    if len(values) == 1:
        return {"p20": values[0], "p50": values[0], "p80": values[0], "repeats": 1}
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": tenths[1], "p50": statistics.median(values), "p80": tenths[7], "repeats": len(values)}


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one row, written at once when it is measured.  ValueError naming the key that is missing or no such value."""
    for key, kind in REQUIRED.items():
        if key not in row:
            raise ValueError(f"a row of case {row.get('case', '?')!r} lacks {key!r}")
        if not isinstance(row[key], kind) or (kind is float and not math.isfinite(row[key])):
            raise ValueError(f"{key!r} of a row of case {row['case']!r} is {row[key]!r}, not a {kind.__name__}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, allow_nan=False) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of one file, or of every *.jsonl in a folder.  Rows that lack keys are taken too; one `value` stands for
    all percentiles."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path] if path.is_file() else []
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines() if line]
    for row in rows:
        if "value" in row:
            row |= spread([row["value"]])
    return rows


def newest(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest row of each key, the later one of two of the same time."""
    latest: dict[tuple, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row.get("date", "")):
        latest[tuple(row.get(key) for key in KEY)] = row
    return list(latest.values())
