"""`zo env`: what this machine can do, what is missing, and the command that adds it."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

import zo_kernels

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "peft", "safetensors", "triton")


def describe() -> str:
    """A few lines of text, for people and for bug reports."""
    lines = [
        f"zo-finetuner   {_version('zo-finetuner')}   noise contract {zo_kernels.NOISE_VERSION}",
        f"python         {platform.python_version()} on {platform.system()} {platform.machine()}",
        "packages       " + ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
        f"cpu            {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads",
        "gpu            " + _gpu(),
        "backends",
    ]
    for name in zo_kernels.BACKENDS:
        lines.append(f"  {name:<12} {zo_kernels.why_unavailable(name) or 'available' + _detail(name)}")
    for device in ("cpu", "cuda"):
        ops, statistics = zo_kernels.backend_name(device), zo_kernels.backend_name(device, "block_stats")
        lines.append(f"ops on {device:<7} {ops}" + f", block statistics {statistics}" * (statistics != ops))
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed (pip install {package})"


def _gpu() -> str:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.version.cuda is None:
        return "none: this torch is a CPU build (on a GPU machine, pip install the CUDA build)"
    return "none visible (nvidia-smi and CUDA_VISIBLE_DEVICES tell why)"


def _detail(backend: str) -> str:
    if backend == "cuda":
        return " (block statistics)"
    if backend != "cpu":
        return ""
    from zo_kernels.backends import cpu

    return f" ({cpu.isa()})" if hasattr(cpu, "isa") else ""
