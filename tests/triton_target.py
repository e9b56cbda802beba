"""What the tests of the Triton backend share: where it runs (Triton's interpreter on any machine, and a GPU where there
is one), calls with placed arguments, the tensors they run on.  The interpreter pays per program (30 ms each), so sizes
are small."""

from __future__ import annotations

import importlib
import math
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch

from zo_kernels.blocks import Blocks, BlockStats
from zo_kernels.ops import seed_tensor
from zo_kernels.rounding import round_stochastic

triton = pytest.importorskip("triton")

SEEDS = (0, 2**63 + 5, 2**64 - 1)
TENSOR_ID = 0xDEADBEEF
SIZES = (1, 1003, 4099)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RADIUS = math.sqrt(2 * math.log(2) * 33)  # the largest normal
UNIT = 2.0**-24  # fp32 arithmetic errs by this share of its result
NUMPY = tuple(int(part) for part in numpy.__version__.split(".")[:2])


@pytest.fixture(scope="session")
def interpreted():
    """The backend as the interpreter runs it: a second import of its modules, under other decorators.

    The copies leave `sys.modules` again and no environment variable stays set, so that test files which
    compile the same kernels can run in this process, before or after."""
    if triton.__version__.startswith("3.6.") and NUMPY >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 needs numpy < 2.4")
    ours = ("zo_kernels.triton_kernels", "zo_kernels.backends.triton")

    def take() -> dict:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(ours)}

    before = take()
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        backend = importlib.import_module("zo_kernels.backends.triton")
    copies = take()
    sys.modules.update(before)
    for name in copies:  # `from package import module` takes the package's attribute
        package, _, last = name.rpartition(".")
        if name in before:
            setattr(sys.modules[package], last, before[name])
        elif package in sys.modules:
            delattr(sys.modules[package], last)
    return backend


@pytest.fixture(params=["interpreter", "cuda"] if torch.cuda.is_available() else ["interpreter"])
def target(request):
    """(backend, device, budget): budget(r) is the contract's bound on the error of a normal of radius r."""
    if request.param == "interpreter":
        backend, device = request.getfixturevalue("interpreted"), torch.device("cpu")
        return SimpleNamespace(backend=backend, device=device, budget=lambda r: 1e-6 + 2e-6 * r)
    backend, device = importlib.import_module("zo_kernels.backends.triton"), torch.device("cuda", 0)
    return SimpleNamespace(
        backend=backend, device=device, budget=lambda r: 1e-6 + 2e-6 * r + (4e-7 / r).clamp(max=6e-4)
    )


def worst_normal(target) -> float:
    """Bound on the error of any normal: the budget peaks at one end of the radii."""
    return float(target.budget(torch.tensor([1e-9, RADIUS])).max())


def put(value, device):
    """A coefficient (float, list or tensor) or None, on the device."""
    return None if value is None else torch.as_tensor(value, dtype=torch.float32).to(device)


def put_seed(value, device):
    return None if value is None else seed_tensor(value, device)


def words(module, groups, seed, stream, first_group, device="cpu"):
    out = torch.empty((groups, 4), dtype=torch.int32, device=device)
    module.words(out, seed_tensor(seed, device), TENSOR_ID, stream, first_group)
    return out.cpu()


def noise(module, numel, seed, start, dist, device="cpu", tensor_id=TENSOR_ID):
    out = torch.empty(numel, dtype=torch.float32, device=device)
    module.noise(out, seed_tensor(seed, device), tensor_id, start, dist)
    return out.cpu()


def stats_of(count, device="cpu"):
    """Statistics for an op to fill; a value that it leaves shows."""
    floats = (torch.full((count,), 77.0, device=device) for _ in range(3))
    return BlockStats(*floats, torch.full((count,), 77, device=device))


def blocks_of(tensors, offsets=None):
    return Blocks([(f"block{i}", tensor) for i, tensor in enumerate(tensors)], offsets=offsets)


def mixed(device="cpu"):
    """A list of all dtypes and sizes; values of size 1 spread over many binades of the 16-bit dtypes."""
    generator = torch.Generator().manual_seed(1)
    tensors = []
    for dtype in DTYPES:
        for size in SIZES:
            values = torch.randn(size, generator=generator) * torch.exp2(torch.arange(size) % 12 - 8.0)
            tensors.append(values.to(dtype).to(device))
    return tensors


def misfits(device="cpu"):
    """What the 16-byte body cannot take: odd addresses, transposes, column slices, channels-last, offsets."""
    generator = torch.Generator().manual_seed(2)
    tensors, offsets = [], []
    for dtype in DTYPES:
        for make in (
            lambda x: x[1:1004],
            lambda x: x[:1200].view(40, 30).t(),
            lambda x: x[:1280].view(40, 32)[:, 3:20],
            lambda x: x[:1200].view(2, 3, 10, 20).to(memory_format=torch.channels_last)[..., ::2],
            lambda x: x[:1000],
            lambda x: x[:2051],
        ):
            tensors.append(make(torch.randn(2100, generator=generator).to(dtype).to(device)))
        offsets += [0, 64, 3, 2**33 + 1, 2**35 - 500, 65536 * 3 - 1]
    return tensors, offsets


def updated(module, tensors, coefs, dist, *, scale="block", decay=None, rounding=None, offsets=None, stats=None):
    """The tensors after one axpy_, on the CPU.  A scale per "block" makes a wrong block index visible, one per
    "direction" and block a wrong direction too; None: no scale."""
    device, count = tensors[0].device, len(tensors)
    shape = {"block": (count,), "direction": (len(coefs), count), None: (0,)}[scale]
    module.axpy_(
        blocks_of(tensors, offsets),
        seed_tensor(SEEDS[: len(coefs)], device),
        put(coefs, device),
        None if scale is None else torch.linspace(0.5, 2, math.prod(shape)).view(shape).to(device),
        put(decay, device),
        put_seed(rounding, device),
        dist,
        stats,
    )
    return [tensor.cpu() for tensor in tensors]


def scratches(
    module, theta, coef, dist, *,
    seed=2**64 - 3, scale=None, nearest_above=None, rows=None, mirror=False, shift=0, stats=None, offset=0,
):  # fmt: skip
    """`scratch` of theta into fresh tensors, `shift` elements off their 16-byte boundary: [out] or [out, mirror], on
    the CPU."""
    device = theta.device
    shape = theta.shape if rows is None else (len(rows), *theta.shape[1:])
    storage = torch.empty((2, math.prod(shape) + 16 - math.prod(shape) % 16 + shift), dtype=theta.dtype, device=device)
    outs = [row[shift : shift + math.prod(shape)].view(shape) for row in storage[: 1 + mirror]]
    module.scratch(
        theta,
        outs[0],
        outs[1] if mirror else None,
        TENSOR_ID,
        seed_tensor(seed, device),
        put(coef, device),
        put(scale, device),
        put(nearest_above, device),
        None if rows is None else torch.tensor(rows, dtype=torch.int64, device=device),
        dist,
        stats,
        offset=offset,
    )
    return [out.cpu() for out in outs]


def step_error(target, acc, coefs):
    """Bound on the difference between two accumulators of steps coefs (scales up to 2) that end near acc: the normals'
    errors, and in both a rounding (UNIT of the largest intermediate value) per step; one more for these bounds."""
    reach = 2 * sum(abs(coef) for coef in coefs)
    roundings = (2 * len(coefs) + 1) * UNIT * (acc.abs() + reach * RADIUS)
    return reach * worst_normal(target) + roundings


def assert_rounded(actual, acc, error, bits=None):
    """`actual` is the rounding (by these bits, or to nearest) of a value within `error` of acc (fp32): rounding is
    monotone, so it lies between the roundings of the two ends."""
    low, high = acc - error, acc + error
    if actual.dtype != torch.float32:
        ends = (low, high)
        low, high = (e.to(actual.dtype) if bits is None else round_stochastic(e, bits, actual.dtype) for e in ends)
    assert ((low <= actual) & (actual <= high)).all()
