"""What a device can do: the public numbers of common GPUs, and a probe of the CPU that this runs on.

Rates are datasheet numbers times two factors.  MATMUL, of the dense 16-bit rate with fp32 accumulation, is an
assumption.  COPY, of the memory bandwidth, was measured on an H200 (a device copy reads and writes 4.3 of 4.8 TB/s)
and is assumed elsewhere.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from zo_finetuner.errors import InputError, nearest
from zo_kernels import Blocks, perturb_, seed_tensor

MATMUL, COPY = 0.6, 0.9
#: Bytes that no tensor shows: CUDA context and cuBLAS workspaces; and the share that the allocator leaves unused.
CONTEXT, FRAGMENTS = 800 << 20, 0.02


@dataclass(frozen=True)
class Device:
    """memory: GiB as the driver reports it.  half, single: dense TFLOP/s with 16-bit and fp32 inputs.  bandwidth: GB/s,
    reads and writes together; elementwise: that of torch's operators besides matrix products, 0 where it is the same.
    measured: the rates were taken on this machine, no factor applies."""

    name: str
    memory: float
    half: float
    single: float
    bandwidth: float
    elementwise: float = 0.0
    measured: bool = False

    def flops(self, dtype: torch.dtype) -> float:
        """Matrix products in the dtype, per second."""
        return (self.single if dtype == torch.float32 else self.half) * 1e12 * (1 if self.measured else MATMUL)

    @property
    def bytes(self) -> float:
        """Bytes that a pass over the weights reads and writes, per second."""
        return self.bandwidth * 1e9 * (1 if self.measured else COPY)

    @property
    def traffic(self) -> float:
        """Bytes that elementwise operators read and write, per second."""
        return self.elementwise * 1e9 or self.bytes

    def holds(self, tensors: int) -> bool:
        """Whether so many bytes of tensors fit."""
        return tensors * (1 + FRAGMENTS) + (0 if self.measured else CONTEXT) <= self.memory * 2**30


GPUS = (
    Device("L4", 22.5, 121, 30.3, 300),
    Device("A10", 22.5, 125, 31.2, 600),
    Device("RTX 3090", 24.0, 71, 35.6, 936),
    Device("RTX 4090", 24.0, 165, 82.6, 1008),
    Device("RTX 5090", 31.8, 209.5, 104.8, 1792),
    Device("A100 40GB", 39.5, 312, 19.5, 1555),
    Device("L40S", 44.5, 362, 91.6, 864),
    Device("RTX A6000", 47.5, 155, 38.7, 768),
    Device("A100 80GB", 79.2, 312, 19.5, 2039),
    Device("H100 PCIe", 79.2, 756, 51, 2000),
    Device("H100", 79.2, 989, 67, 3350),
    Device("H200", 139.8, 989, 67, 4800),
    Device("B200", 178.3, 2250, 75, 7700),
)


def find_device(name: str) -> Device:
    """A GPU of the table by its name.  InputError for any other."""
    for device in GPUS:
        if device.name.casefold() == name.strip().casefold():
            return device
    names = [device.name for device in GPUS]
    raise InputError(f'unknown device "{name}"{nearest(name, names)}; there are: cpu, {", ".join(names)}')


def present_gpu() -> Device | None:
    """The first visible GPU with its own memory, and the table's rates where its name tells (else rates of 0)."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return described(properties.name, properties.total_memory / 2**30)


def described(name: str, memory: float) -> Device:
    """A GPU by the driver's name ("NVIDIA A100-SXM4-80GB") and memory (GiB): the table's row whose name it holds, the
    longest first, and of several memory sizes the nearest."""
    words = name.replace("-", " ").casefold().split()
    known = [d for d in GPUS if set(_model(d)) <= set(words)]
    if not known:
        return Device(name, memory, 0, 0, 0)
    best = min(known, key=lambda d: (-len(_model(d)), abs(d.memory - memory)))
    return Device(name, memory, best.half, best.single, best.bandwidth)


def _model(device: Device) -> list[str]:
    return [word for word in device.name.casefold().split() if not word.endswith("gb")]


def probe_cpu(dtype: torch.dtype, tokens: int, width: int) -> Device:
    """This machine's CPU as torch uses it.  Rates are timed in about a second: a product (tokens, width) x (width,
    width), at most 2^28 multiply-adds; a SiLU of (tokens, width), which is about what the operators of a layer take on
    average; and the package's own perturbation of 2^22 elements.  All in `dtype`."""
    tokens = max(1, min(tokens, (1 << 28) // width**2))
    left, right = torch.ones(tokens, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
    flops = 2 * tokens * width**2 / _seconds(lambda: left @ right.T)
    traffic = 2 * left.nbytes / _seconds(lambda: F.silu(left))
    weights = Blocks([("probe", torch.zeros(1 << 22, dtype=dtype))])
    seed, coef = seed_tensor(0), torch.tensor(1e-3)
    moved = 2 * weights.tensors[0].nbytes / _seconds(lambda: perturb_(weights, seed, coef))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name = f"this CPU ({torch.get_num_threads()} threads)"
    return Device(name, memory, flops / 1e12, flops / 1e12, moved / 1e9, traffic / 1e9, measured=True)


def _seconds(run: Callable[[], object], budget: float = 0.2) -> float:
    """The median of the runs that fit the budget (at least one), after one to warm up."""
    run()
    times, end = [], time.perf_counter() + budget
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
