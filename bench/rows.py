"""One row of a benchmark: a JSON line that says what was measured, on what machine, with which versions and commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def machine() -> dict[str, Any]:
    """Device, versions and commit of this process, the same in all of its rows."""

    def git(*words: str) -> str:
        run = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        return run.stdout.strip()

    return {
        "device": _device(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.date.today().isoformat(),
    }


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{model}, {os.cpu_count()} cores"


def spread(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80 of repeated measurements."""
    if len(values) == 1:
        return {"p20": values[0], "p50": values[0], "p80": values[0], "repeats": 1}
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": tenths[1], "p50": statistics.median(values), "p80": tenths[7], "repeats": len(values)}


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one row, written at once when it is measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
