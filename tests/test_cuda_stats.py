"""Block statistics of the cuda backend: its arithmetic on the host, thread by thread in the order of the GPU, against
fp64; its tables; and where there is a GPU, the same bits from the kernels.

The error budget, u = 2^-24: a thread's sums of d = x - shift and of d^2 pass through at most k roundings each,
k = W + V + 4 with W elements in a vector and V vectors in a thread (1 for d, which the square has twice, W in a vector,
V to add the vectors; 2^-23 for underflow, which the code bounds).  With A = sum |d|, Q = sum d^2 of a thread, m the
mean of all:
    sum of d  ku A       sum of (x - m)^2  ku (Q + 2 |shift - m| A)       sum of x^2  ku (Q + 2 |shift| A)
plus 64 roundings in fp64 (8 levels of trees twice, 3 operations each, and the 16 chunks of a thread) and one to fp32.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import zo_kernels as zk
from zo_kernels.backends import reference
from zo_kernels.blocks import DTYPES, Blocks, BlockStats

ROOT = Path(__file__).resolve().parent.parent
CHUNK, THREADS, U = 1 << 16, 256, 2.0**-24

HOST = """
#include "cuda/statistics.h"
#include <vector>

template <class Own>
zo::Moments over_block(Own own) {
  std::vector<zo::Moments> parts;
  for (int t = 0; t < zo::THREADS; ++t) parts.push_back(own(t));
  for (int width = zo::THREADS / 2; width > 0; width /= 2)
    for (int t = 0; t < zo::THREADS; ++t) zo::fold(parts.data(), t, width);
  return parts[0];
}

extern "C" void block_stats(const zo::Chunk* chunks, int64_t chunk_count, const zo::Span* spans, int64_t block_count,
                            zo::Moments* moments, float* mean, float* var, float* norm, int64_t* nonfinite) {
  for (int64_t c = 0; c < chunk_count; ++c)
    moments[c] = over_block([&](int t) { return zo::thread_moments(chunks[c], t); });
  for (int64_t b = 0; b < block_count; ++b) {
    const zo::Result r = zo::result(over_block([&](int t) { return zo::thread_merged(moments, spans[b], t); }));
    mean[b] = r.mean, var[b] = r.var, norm[b] = r.norm, nonfinite[b] = r.nonfinite;
  }
}

extern "C" int moments_bytes() { return sizeof(zo::Moments); }
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """The backend with the kernels' arithmetic compiled for the host in place of `zo_kernels._cuda`."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("host")
    (folder / "host.cpp").write_text(HOST)
    command = [compiler, "-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    command += ["-Wall", "-Wextra", "-Werror", "-o", str(folder / "host.so"), str(folder / "host.cpp")]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(folder / "host.so"))

    def block_stats(device, stream, *arguments):
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        library.block_stats.argtypes = [pointer, count, pointer, count, *[pointer] * 5]
        library.block_stats(*arguments)

    native = SimpleNamespace(
        CHUNK=CHUNK, MOMENTS_BYTES=library.moments_bytes(), load_kernels=lambda device: None, block_stats=block_stats
    )
    backend = imported(native)
    backend._on = lambda device: contextlib.nullcontext()
    backend._stream = lambda device: 0
    backend.is_current_stream_capturing = lambda: False
    return backend


def imported(native):
    """A copy of the backend that has `native` for its compiled module; `sys.modules` stays as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "zo_kernels._cuda", native)
        patch.setattr(zk, "_cuda", native, raising=False)
        patch.setitem(sys.modules, "zo_kernels.backends.cuda", None)
        del sys.modules["zo_kernels.backends.cuda"]
        return importlib.import_module("zo_kernels.backends.cuda")


def named(tensors) -> Blocks:
    return Blocks([(f"block{i}", tensor) for i, tensor in enumerate(tensors)])


def stats(backend, tensors) -> BlockStats:
    blocks = tensors if isinstance(tensors, Blocks) else named(tensors)
    blocks.refresh()
    filled = BlockStats(*(torch.full_like(vector, 77) for vector in BlockStats.empty(len(blocks), blocks.device)))
    backend.block_stats(blocks, filled)
    return BlockStats(*(vector.cpu() for vector in filled))


def same(a: BlockStats, b: BlockStats) -> bool:
    """Equal to the last bit, or NaN in both."""
    return all(torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in zip(a, b, strict=True))


def exact(tensor, head=None) -> tuple[np.ndarray, ...]:
    """(mean, variance, norm) in fp64, and what each may differ from them in fp32: the budget of the docstring; with
    `head`, of threads that share as shift the mean of so many first elements of the chunk."""
    x = tensor.detach().cpu().reshape(-1).double().numpy()
    n, width = len(x), 16 // tensor.element_size()
    mean = x[0] + (x - x[0]).mean()
    m2, square = ((x - mean) ** 2).sum(), (x * x).sum()
    values = np.array([mean, m2 / max(n - 1, 1), math.sqrt(square)])
    # (chunk, vector of the thread, thread, element of the vector); what is missing is the shift, with d = 0.
    padded = np.concatenate((x, np.full(-n % CHUNK, np.nan))).reshape(-1, CHUNK // THREADS // width, THREADS, width)
    shift = padded[:, :1, :, :1]
    if head:
        shift = np.nanmean(padded.reshape(-1, CHUNK)[:, :head], axis=1)[:, None, None, None]
    d = np.where(np.isnan(padded), 0, padded - shift)
    away, squares = np.abs(d).sum((1, 3)), (d * d).sum((1, 3))
    shift = np.where(np.isnan(shift), mean, shift)[:, 0, :, 0]
    k = (width + CHUNK // THREADS // width + 4) * U
    about_first = ((x - x[0]) ** 2).sum() + squares.sum() + ((shift - x[0]) ** 2).sum() * CHUNK // THREADS
    doubles = 64 * 2.0**-53 * about_first
    error_m2 = k * (squares + 2 * np.abs(shift - mean) * away).sum() + doubles
    error_square = k * (squares + 2 * np.abs(shift) * away).sum() + doubles + 64 * 2.0**-53 * square
    error_norm = error_square / values[2] if values[2] else 0
    errors = np.array([k * away.sum() / n + 64 * 2.0**-53 * np.abs(x).max(), error_m2 / max(n - 1, 1), error_norm])
    return values, errors + (1 + U) * U * np.abs(values) + 2.0**-150


def assert_within_budget(actual: BlockStats, tensors):
    for b, tensor in enumerate(tensors):
        values, budget = exact(tensor)
        values = np.where(np.abs(values) < float.fromhex("0x1.ffffffp127"), values, np.inf)  # what rounds to infinity
        found = [float(vector[b]) for vector in actual[:3]]
        within = [f == v or abs(f - v) <= e for f, v, e in zip(found, values, budget, strict=True)]
        assert all(within), f"block {b}: mean, var, norm {found}, {values} within {budget}"
    assert not actual.nonfinite.any()


def draw(kind, numel, dtype, seed=0, device="cpu"):
    x = torch.randn(numel, generator=torch.Generator().manual_seed(seed)).double()
    x = {
        "weights": x * 0.02,
        "far from zero": 1 + 1e-4 * x,
        "outliers first": torch.where(torch.arange(numel) % 2048 < 8, 3.0, 0.5 + 0.01 * x),
        "zero first": torch.where(torch.arange(numel) == 0, 0.0, 1 + 1e-4 * x),
        "tiny": x * 1e-25 if dtype is not torch.float16 else x * 1e-6,
        "squares overflow": x * 3e18 if dtype is not torch.float16 else x * 1e4,
    }[kind]
    return x.to(dtype).to(device)


KINDS = ("weights", "far from zero", "outliers first", "zero first", "tiny", "squares overflow")
SIZES = (1, 2, 3, 7, 8, 9, 1003, 2047, 2048, 2049, 8192 + 5, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 12345)


def shifted(tensor, by):
    """The same values, `by` elements off a 16-byte boundary."""
    storage = torch.empty(tensor.numel() + by, dtype=tensor.dtype, device=tensor.device)
    return storage[by:].copy_(tensor)


def mixed(kind, device="cpu"):
    tensors = []
    for i, numel in enumerate(SIZES):
        for dtype in DTYPES:
            tensors.append(shifted(draw(kind, numel, dtype, i, device), i % 5))
    return tensors


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_within_the_budget(host, kind):
    tensors = mixed(kind)
    assert_within_budget(stats(host, tensors), tensors)


def test_fp32_weights_around_1_have_their_small_variance(host):
    """What E[x^2] - mean^2 in fp32 cannot see; the budget itself is this tight."""
    x = draw("far from zero", 200_000, torch.float32)
    assert exact(x)[1][1] <= 2e-5 * exact(x)[0][1]
    var = stats(host, [x]).var.item()
    assert abs(var / x.double().var().item() - 1) <= 2e-5


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 0.02, 6e4])
def test_a_constant_has_variance_0(host, value):
    tensors = [torch.full((numel,), value).to(dtype) for numel in SIZES for dtype in DTYPES]
    actual = stats(host, tensors)
    assert torch.equal(actual.var, torch.zeros(len(tensors)))
    assert torch.equal(actual.mean, torch.stack([tensor[0].float() for tensor in tensors]))
    assert_within_budget(actual, tensors)


def test_nothing_is_as_the_reference_says(host):
    tensors = [torch.ones(3), torch.empty(0), torch.empty((0, 4), dtype=torch.bfloat16), torch.full((1,), 2.0)]
    assert same(stats(host, tensors), stats(reference, tensors))
    assert same(stats(host, tensors[1:3]), stats(reference, tensors[1:3]))
    host.block_stats(Blocks([]), BlockStats.empty(0, torch.device("cpu")))


def poisoned(device="cpu"):
    """Tensors with non-finite elements between two without, and how many."""
    tensors, counts = [], []
    for dtype in DTYPES:
        for numel, places in (
            (9, [0]),
            (9, [8]),
            (5000, [0, 1, 7, 2048, 2049, 4999]),
            (3 * CHUNK + 77, [5, CHUNK, CHUNK + 2048, 3 * CHUNK + 76]),
            (2 * CHUNK, range(2 * CHUNK)),
        ):
            x = draw("weights", numel, dtype)
            x[list(places)] = torch.tensor([math.inf, math.nan, -math.inf], dtype=dtype).repeat(numel)[: len(places)]
            tensors += [draw("weights", 4099, dtype).to(device), x.to(device)]
            counts += [0, len(places)]
    return [*tensors, draw("weights", 70_001, torch.float32).to(device)], torch.tensor([*counts, 0])


def test_non_finite_elements_are_counted(host):
    tensors, counts = poisoned()
    actual = stats(host, tensors)
    assert torch.equal(actual.nonfinite, counts)
    for vector in actual[:3]:
        assert torch.equal(vector.isnan(), counts > 0)
    whole = [tensor for tensor, count in zip(tensors, counts, strict=True) if not count]
    assert same(BlockStats(*(vector[counts == 0] for vector in actual)), stats(host, whole))


def test_every_kind_of_infinity_and_nan_is_counted(host):
    """All bit patterns of the 16-bit dtypes: 2 infinities, and NaNs."""
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        everything = patterns.view(dtype)
        finite = everything[everything.isfinite()]
        actual = stats(host, [everything, finite])
        assert actual.nonfinite.tolist() == [len(everything) - len(finite), 0]
        assert_within_budget(BlockStats(*(vector[1:] for vector in actual)), [finite])


@pytest.mark.parametrize("kind", ["weights", "squares overflow"])
def test_alignment_and_the_rest_of_the_list_change_no_bit(host, kind):
    """Slices of the list, another order, the tensors 1 to 7 elements off a 16-byte boundary."""
    tensors = mixed(kind)
    whole = stats(host, tensors)
    assert same(stats(host, tensors), whole)
    for shift in (0, 1, 2, 7):
        assert same(stats(host, [shifted(tensor, shift) for tensor in tensors]), whole)
    order = torch.randperm(len(tensors)).tolist()
    assert same(stats(host, [tensors[i] for i in order]), BlockStats(*(vector[order] for vector in whole)))
    assert same(stats(host, tensors[4:9]), BlockStats(*(vector[4:9] for vector in whole)))


def test_dense_tensors_are_read_in_place_and_strided_ones_copied(host):
    base = draw("weights", 320 * 210, torch.bfloat16)
    for view in (base.view(320, 210).t(), base.view(8, 40, 210).permute(1, 2, 0), base.view(1, 320, 1, 210).mT):
        blocks = named([view])
        assert same(stats(host, blocks), stats(host, [base]))
        assert not blocks.cuda_tables.copies
    plain = torch.randn(64, 100)
    for view in (plain[:, 3:20], plain.view(64, 10, 10)[:, :, ::2], plain[::3]):
        blocks = named([draw("weights", 1000, torch.float16), view])
        for _ in range(2):  # the copy is made anew at every call
            contiguous = [blocks.tensors[0], view.clone(memory_format=torch.contiguous_format)]
            assert same(stats(host, blocks), stats(host, contiguous))
            if view._base is plain:
                plain.mul_(3)
        assert len(blocks.cuda_tables.copies) == 1


def test_tables_stay_until_a_tensor_moves(host):
    parameter = torch.nn.Parameter(draw("weights", 3 * CHUNK + 5, torch.bfloat16), requires_grad=False)
    blocks = named([torch.ones(10), parameter, torch.empty(0), torch.ones(CHUNK)])
    stats(host, blocks)
    tables = blocks.cuda_tables
    assert tables.spans.tolist() == [[0, 1], [1, 4], [5, 0], [5, 1]]
    sizes = [row & 0xFFFFFFFF for row in tables.chunks[:, 1].tolist()]
    assert sizes == [10, CHUNK, CHUNK, CHUNK, 5, CHUNK]
    assert [row >> 32 for row in tables.chunks[:, 1].tolist()] == [0, 1, 1, 1, 1, 0]
    assert tables.chunks[1:5, 0].tolist() == [parameter.data_ptr() + 2 * CHUNK * i for i in range(4)]
    stats(host, blocks)
    assert blocks.cuda_tables is tables
    parameter.data = draw("far from zero", 3 * CHUNK + 5, torch.bfloat16)
    assert same(stats(host, blocks), stats(host, blocks.tensors))
    assert blocks.cuda_tables is not tables


def test_cpu_tensors_are_refused():
    with pytest.raises(ValueError, match="the cuda backend works on cuda tensors, got cpu"):
        stats(imported(SimpleNamespace()), [torch.ones(3)])


@pytest.fixture
def gpu():
    """The backend and the kernels themselves."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    reason = zk.why_unavailable("cuda")
    if reason:
        pytest.skip(reason)
    return importlib.import_module("zo_kernels.backends.cuda")


@pytest.mark.parametrize("kind", KINDS)
def test_the_gpu_gives_the_bits_of_the_host(gpu, host, kind):
    """Every operation is one that IEEE 754 defines, in an order that statistics.h fixes."""
    tensors = mixed(kind, "cuda")
    actual = stats(gpu, tensors)
    assert same(actual, stats(host, [tensor.cpu() for tensor in tensors]))
    assert_within_budget(actual, tensors)
    assert all(same(stats(gpu, tensors), actual) for _ in range(5))
    assert same(stats(gpu, tensors[::-1]), BlockStats(*(vector.flip(0) for vector in actual)))


def test_the_gpu_counts_non_finite_elements(gpu, host):
    tensors, counts = poisoned("cuda")
    actual = stats(gpu, tensors)
    assert torch.equal(actual.nonfinite, counts)
    assert same(actual, stats(host, [tensor.cpu() for tensor in tensors]))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tiny"])  # whose squares Triton loses
def test_the_gpu_agrees_with_the_triton_backend(gpu, kind):
    """Within both budgets: Triton sums no more numbers in a chain, about the mean of a chunk's first 128."""
    if zk.why_unavailable("triton"):
        pytest.skip("no triton")
    tensors = mixed(kind, "cuda")
    blocks = named(tensors)
    with zk.use_backend("triton"):
        theirs = BlockStats(*(vector.cpu() for vector in zk.block_stats(blocks)))
    ours = BlockStats(*(vector.cpu() for vector in zk.block_stats(blocks)))
    for b, tensor in enumerate(tensors):
        budget = exact(tensor)[1] + exact(tensor, head=128)[1]
        difference = [abs(float(x[b]) - float(y[b])) for x, y in zip(ours[:3], theirs[:3], strict=True)]
        assert (np.array(difference) <= budget).all(), f"block {b}: {difference / budget} of the budgets"


def test_more_than_2_to_the_31_elements(gpu):
    """A pattern of 65,536 elements repeated, and something else behind element 2^31; element 2^31 + 70,000 infinite."""
    try:
        x = torch.empty(2**31 + CHUNK + 5000, dtype=torch.bfloat16, device="cuda")
    except torch.OutOfMemoryError:
        pytest.skip("needs 4.3 GB")
    pattern = draw("weights", CHUNK, torch.bfloat16, device="cuda")
    x[: 2**31].view(-1, CHUNK).copy_(pattern)
    x[2**31 :] = 3.0
    repeats, rest = 2**31 // CHUNK, CHUNK + 5000
    p = pattern.double()
    mean = (repeats * p.sum() + 3.0 * rest).item() / x.numel()
    square = (repeats * (p * p).sum() + 9.0 * rest).item()
    actual = stats(gpu, [x])
    values, budget = exact(pattern)  # of one repetition; the chunks are alike, and what is constant adds no error
    budget *= 1.01  # the mean of all is 1e-4 off the pattern's, whose deviation is 0.02
    assert abs(actual.mean.item() - mean) <= budget[0] + U * abs(mean)
    assert abs(actual.norm.item() - math.sqrt(square)) <= budget[2] / values[2] * math.sqrt(square)
    var = (square - x.numel() * mean**2) / (x.numel() - 1)
    assert abs(actual.var.item() - var) <= budget[1] + U * var
    x[2**31 + 70_000] = math.inf
    assert stats(gpu, [x]).nonfinite.item() == 1


def test_statistics_replay_in_a_cuda_graph(gpu):
    tensors = [draw("weights", numel, dtype, device="cuda") for numel in SIZES for dtype in DTYPES]
    tensors.append(torch.randn(64, 100, device="cuda")[:, :50])
    blocks = named(tensors)
    zk.block_stats(blocks)  # builds the tables
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = zk.block_stats(blocks)
    for factor in (2.0, 0.5):
        for tensor in tensors:
            tensor.mul_(factor)
        graph.replay()
        assert same(BlockStats(*(vector.cpu() for vector in result)), stats(gpu, blocks))


def test_tables_are_not_built_under_capture(gpu):
    blocks = named([torch.ones(100, device="cuda")])
    with pytest.raises(RuntimeError, match="make one call before capturing"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            gpu.block_stats(blocks, BlockStats.empty(1, blocks.device))
