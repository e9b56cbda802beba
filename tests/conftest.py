"""Fixtures shared by all tests: one thread per process, the folder of development data, tiny random models."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: no test touches the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes share two cores; subprocesses inherit it

import pytest
import torch

import zo_kernels as zk

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The development data beside the repository (golden traces, real rows, small models); skips when absent."""
    path = Path(os.environ.get("ZO_DATA", ROOT.parent / "shared"))
    if not (path / "golden").is_dir():
        pytest.skip(f"development data not found at {path} (set ZO_DATA)")
    return path


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Every op in the test runs on this backend."""
    reason = zk.why_unavailable(request.param)
    if reason:
        pytest.skip(reason)
    with zk.use_backend(request.param):
        yield request.param


@pytest.fixture
def cpu():
    """The native module, for what only it has."""
    reason = zk.why_unavailable("cpu")
    if reason:
        pytest.skip(reason)
    from zo_kernels import _C

    with zk.use_backend("cpu"):
        yield _C


@pytest.fixture
def without_pictures():
    """`zo train` draws nothing: half of the time of a tiny run."""
    from zo_finetuner import training

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "write_report", lambda *_: None)
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    yield


def pytest_configure(config):
    torch.set_num_threads(1)
