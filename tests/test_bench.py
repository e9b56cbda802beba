"""The benchmark's rows say what was measured, where, with which versions."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT

from zo_kernels import why_unavailable


def test_kernel_rows(tmp_path):
    if why_unavailable("cpu"):
        pytest.skip(why_unavailable("cpu"))
    run = subprocess.run(
        [sys.executable, "-m", "bench", "kernels", "--quick", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )
    assert run.returncode == 0, run.stderr
    from bench.rows import read

    rows = read(tmp_path / "kernels.jsonl")
    assert {r["provider"] for r in rows} == {"cpu", "torch", "copy"}
    for row in rows:
        assert row["p20"] <= row["p50"] <= row["p80"]
        assert row["p50"] > 0 or row["case"] == "changed"
        assert {"case", "dtype", "n", "metric", "unit", "repeats", "device", "torch", "commit", "dirty"} <= set(row)
