"""Which backend runs an op: the tensor's device decides, `ZO_BACKEND` or `use_backend()` override.

    cpu tensors   -> cpu (C++, `zo_kernels._C`) where it was built, else reference
    cuda tensors  -> triton where it is installed, else reference;
                     block_stats -> cuda (`zo_kernels._cuda`, that op alone) where it was built, else as the others
    meta tensors  -> nothing is computed, whatever is chosen

Import touches neither CUDA nor Triton: a backend module is imported at its first use.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")
ONLY = {"cuda": {"block_stats"}}  # backends that have some of the ops; the others go where the device decides

_override: str | None = None


def why_unavailable(name: str) -> str | None:
    """None when the backend can be used here, else the reason and the command that mends it."""
    if name == "cpu" and importlib.util.find_spec("zo_kernels._C") is None:
        return (
            "zo_kernels._C is not built: install a C++17 compiler, then `pip install -e .` "
            "(ZO_BUILD_EXT=1 shows why a build fails)"
        )
    if name == "cuda" and importlib.util.find_spec("zo_kernels._cuda") is None:
        return "zo_kernels._cuda is not built: install the CUDA toolkit (nvcc), then `pip install -e .`"
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return None


def _known(name: str) -> str:
    if name not in BACKENDS:
        listed = ", ".join(f"{b} ({why_unavailable(b) or 'available'})" for b in BACKENDS)
        raise ValueError(f"unknown backend {name!r}; there are: {listed}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside with the named backend.  ValueError when it does not exist or is not available."""
    global _override
    reason = why_unavailable(_known(name))
    if reason:
        raise ValueError(f"backend {name!r} is not available: {reason}")
    before, _override = _override, name
    try:
        yield
    finally:
        _override = before


@functools.cache
def _loads() -> bool:
    """Whether this GPU and driver run the machine code in `_cuda` (a T4 is older than its oldest, sm_80)."""
    if not torch.cuda.is_available():
        return True  # `zo env` asks what would be
    from zo_kernels import _cuda

    try:
        _cuda.load_kernels(torch.cuda.current_device())
    except RuntimeError as error:
        warnings.warn(f"block statistics come from Triton, not from zo_kernels._cuda: {error}", stacklevel=1)
        return False
    return True


def backend_name(device_type: str, op: str = "update_") -> str:
    """The backend that an op on this device type ("cpu", "cuda") uses now."""
    chosen = _override or os.environ.get("ZO_BACKEND")
    if chosen:
        reason = why_unavailable(_known(chosen))
        if reason:
            raise ValueError(f"backend {chosen!r} is not available: {reason}")
        if op in ONLY.get(chosen, {op}):
            return chosen
    if device_type == "cuda" and op in ONLY["cuda"] and not chosen and why_unavailable("cuda") is None and _loads():
        return "cuda"
    name = {"cpu": "cpu", "cuda": "triton"}.get(device_type, "reference")
    reason = why_unavailable(name)
    if reason:
        # Python shows a warning of one place once.
        warnings.warn(f"ops on {device_type} tensors run in plain torch, slowly: {reason}", stacklevel=1)
        return "reference"
    return name


def backend(device_type: str, op: str = "update_") -> ModuleType:
    name = "meta" if device_type == "meta" else backend_name(device_type, op)
    return importlib.import_module(f"zo_kernels.backends.{name}")
