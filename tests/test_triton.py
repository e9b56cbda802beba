"""The Triton backend against the reference: in Triton's interpreter on any machine, and compiled where there
is a GPU.  The interpreter pays per program (30 ms each), so sizes are small and BLOCK decides the cost."""

from __future__ import annotations

import importlib
import inspect
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch

from zo_kernels.backends import reference
from zo_kernels.blocks import Blocks
from zo_kernels.ops import seed_tensor
from zo_kernels.rounding import ulp

triton = pytest.importorskip("triton")

SEEDS = (0, 2**63 + 5, 2**64 - 1)
TENSOR_ID = 0xDEADBEEF
SIZES = (1, 5, 1003, 4099)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RADIUS = math.sqrt(2 * math.log(2) * 33)  # the largest normal
NUMPY = tuple(int(part) for part in numpy.__version__.split(".")[:2])


@pytest.fixture(scope="module")
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
    take()
    sys.modules.update(before)
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


def words(module, groups, seed, stream, first_group, device="cpu"):
    out = torch.empty((groups, 4), dtype=torch.int32, device=device)
    module.words(out, seed_tensor(seed, device), TENSOR_ID, stream, first_group)
    return out.cpu()


def noise(module, numel, seed, start, dist, device="cpu"):
    out = torch.empty(numel, dtype=torch.float32, device=device)
    module.noise(out, seed_tensor(seed, device), TENSOR_ID, start, dist)
    return out.cpu()


def mixed(device):
    """A list of all dtypes and sizes; values of size 1 spread over many binades of the 16-bit dtypes."""
    generator = torch.Generator().manual_seed(1)
    tensors = []
    for dtype in DTYPES:
        for size in SIZES:
            values = torch.randn(size, generator=generator) * torch.exp2(torch.arange(size) % 12 - 8.0)
            tensors.append(values.to(dtype).to(device))
    return tensors


def updated(module, tensors, coefs, dist, *, decay=None, rounding=None, offsets=None):
    """The tensors after one axpy_, on the CPU; a scale per block makes a wrong block index visible."""
    device = tensors[0].device
    blocks = Blocks([(f"block{i}", tensor) for i, tensor in enumerate(tensors)], offsets=offsets)
    module.axpy_(
        blocks,
        seed_tensor(SEEDS[: len(coefs)], device),
        torch.as_tensor(coefs, device=device),
        torch.linspace(0.5, 2, len(tensors), device=device),
        None if decay is None else torch.tensor(decay, device=device),
        None if rounding is None else seed_tensor(rounding, device),
        dist,
    )
    return [tensor.cpu() for tensor in tensors]


def assert_within(actual, expected, error):
    """fp32: within `error` and a rounding; 16 bits: one element in 100 may be rounded the other way."""
    if actual.dtype == torch.float32:
        assert ((actual - expected).abs() <= error + ulp(expected, torch.float32)).all()
    else:
        distance = (actual.float() - expected.float()).abs()
        assert (distance <= ulp(expected.float(), actual.dtype) * 1.001).all()
        assert (distance > 0).sum() <= 0.01 * distance.numel()


def test_the_backends_have_the_same_functions(interpreted):
    for name in ("words", "noise", "axpy_", "scratch", "block_stats"):
        assert inspect.signature(getattr(interpreted, name)) == inspect.signature(getattr(reference, name))


def test_importing_the_package_imports_no_triton():
    check = "import sys, zo_kernels; assert not any(m.split('.')[0] == 'triton' for m in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize(
    ("group", "tensor_id", "stream", "seed", "expected"),
    [
        (0, 0, 0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, 0xFFFFFFFF, 0xFFFFFFFF, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x85A308D3243F6A88 - 2**64,
            0x13198A2E,
            0x03707344,
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_words_pass_the_random123_known_answers(target, group, tensor_id, stream, seed, expected):
    out = torch.empty((1, 4), dtype=torch.int32, device=target.device)
    target.backend.words(out, seed_tensor(seed, target.device), tensor_id, stream, group)
    assert tuple(word & 0xFFFFFFFF for word in out[0].tolist()) == expected


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("stream", "first_group"), [(0, 0), (1, 2**32 - 3), (0xFFFFFFFF, 2**40 + 1)])
def test_words_equal_the_reference(target, seed, stream, first_group):
    for groups in (1, 7, 2051):
        actual = words(target.backend, groups, seed, stream, first_group, target.device)
        assert torch.equal(actual, words(reference, groups, seed, stream, first_group))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("start", [0, 1, 127, 2**35 - 7, 2**41 + 3])
def test_signs_equal_the_reference(target, seed, start):
    for numel in (5, 2500):
        actual = noise(target.backend, numel, seed, start, "rademacher", target.device)
        assert torch.equal(actual, noise(reference, numel, seed, start, "rademacher"))


@pytest.mark.parametrize("start", [0, 2**35 - 6, 2**41 + 2])
def test_normals_are_within_the_budget(target, start):
    for seed in SEEDS:
        actual = noise(target.backend, 4098, seed, start, "normal", target.device)
        expected = noise(reference, 4098, seed, start, "normal")
        radius = expected.double().view(-1, 2).norm(dim=1).repeat_interleave(2)
        assert ((actual.double() - expected.double()).abs() <= target.budget(radius)).all()
        odd = noise(target.backend, 1003, seed, start + 1, "normal", target.device)
        assert torch.equal(odd, actual[1:1004])


@pytest.mark.parametrize("rounding", [None, 2**63 + 11], ids=["nearest", "stochastic"])
@pytest.mark.parametrize(
    ("coefs", "decay"),
    [([1e-3], None), ([1e-3, -3e-2], 0.99), ([1e-3, 2e-3, -1e-2], None)],
    ids=["1", "2", "any"],
)
@pytest.mark.parametrize("dist", ["rademacher", "normal"])
def test_axpy_equals_the_reference(target, coefs, decay, rounding, dist):
    before = mixed("cpu")
    actual = updated(target.backend, mixed(target.device), coefs, dist, decay=decay, rounding=rounding)
    expected = updated(reference, mixed("cpu"), coefs, dist, decay=decay, rounding=rounding)
    error = sum(abs(c) for c in coefs) * 2 * float(target.budget(torch.tensor(RADIUS)))
    if target.device.type == "cuda":
        error += sum(abs(c) for c in coefs) * 2 * 6e-4
    for old, ours, theirs in zip(before, actual, expected, strict=True):
        assert not torch.equal(ours, old) or old.numel() == 1
        if dist == "rademacher":
            assert torch.equal(ours, theirs)
        else:
            assert_within(ours, theirs, error)


def misfits(device):
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


@pytest.mark.parametrize("dist", ["rademacher", "normal"])
def test_misaligned_and_strided_tensors_take_the_masked_form(target, dist):
    tensors, offsets = misfits(target.device)
    actual = updated(target.backend, tensors, [1e-2], dist, rounding=3, offsets=offsets)
    plain = [tensor.contiguous() for tensor in misfits(target.device)[0]]
    expected = updated(reference, [t.cpu() for t in plain], [1e-2], dist, rounding=3, offsets=offsets)
    for ours, theirs in zip(actual, expected, strict=True):
        if dist == "rademacher":
            assert torch.equal(ours, theirs)
        else:
            assert_within(ours, theirs, 2e-2 * (2e-5 if target.device.type == "cpu" else 7e-4))


@pytest.mark.parametrize("rounding", [None, 7])
def test_all_forms_give_the_same_bits(target, monkeypatch, rounding):
    """Tile and chunk size, warps, alignment and place in a shard change no bit of a normal update."""
    size, shift = 3000, 256
    theta = torch.randn(size, generator=torch.Generator().manual_seed(3))

    def run(dtype, *, block=2048, chunk=1 << 16, warps=4, form=None):
        monkeypatch.setitem(target.backend.LAUNCH, "num_warps", warps)
        monkeypatch.setattr(target.backend, "BLOCK", block)
        monkeypatch.setattr(target.backend, "CHUNK", chunk)
        whole = theta.to(dtype, copy=True).to(target.device)
        if form == "misaligned":
            storage = torch.empty(size + 1, dtype=dtype, device=target.device)
            whole = storage[1:].copy_(whole)
        if form == "sharded":  # two shards, the second at an offset; same name, so same noise
            parts = [whole[:shift], whole[shift:]]
            for part, offset in zip(parts, (0, shift), strict=True):
                updated(target.backend, [part], [1e-2, 3e-2], "normal", rounding=rounding, offsets=[offset])
            return whole.cpu()
        return updated(target.backend, [whole], [1e-2, 3e-2], "normal", rounding=rounding)[0]

    for dtype in DTYPES:
        expected = run(dtype)
        assert torch.equal(run(dtype, block=512, warps=8), expected)
        assert torch.equal(run(dtype, block=1024, chunk=1024), expected)
        assert torch.equal(run(dtype, form="misaligned"), expected)
        assert torch.equal(run(dtype, form="sharded"), expected)


@pytest.mark.parametrize("rounding", [None, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_extreme_values_round_as_in_the_reference(target, dtype, rounding):
    """Subnormals, the binade borders, the largest finite values, infinity."""
    tiny, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    edges = torch.tensor(
        [0.0, -0.0, tiny / 2, -tiny / 2, tiny, -tiny, largest, -largest, math.inf, -math.inf]
    )
    spread = tiny * torch.exp2(torch.linspace(-12, 2, 700))
    for coef in (tiny / 16, tiny, largest / 300, math.inf):
        values = torch.cat([edges.repeat(20), spread, -spread]).to(dtype)
        expected = updated(reference, [values.clone()], [coef], "rademacher", rounding=rounding)[0]
        with numpy.errstate(all="ignore"):  # the interpreter's overflows
            actual = updated(
                target.backend, [values.to(target.device)], [coef], "rademacher", rounding=rounding
            )[0]
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual[~actual.isnan()], expected[~actual.isnan()])


@pytest.mark.parametrize("rounding", [None, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_stays_a_nan(target, dtype, rounding):
    theta = torch.full((300,), math.nan, dtype=dtype, device=target.device)
    assert updated(target.backend, [theta], [1e-3], "normal", rounding=rounding)[0].isnan().all()
    theta = torch.ones(300, dtype=dtype, device=target.device)
    full = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # the NaN that a GPU computes
    assert updated(target.backend, [theta], full, "normal", rounding=rounding)[0].isnan().all()


def perturbed(module, theta, coef, dist, *, scale=None, nearest_above=None, rows=None, shift=0):
    """`scratch` of theta into a fresh tensor, `shift` elements off its 16-byte boundary, on the CPU."""
    device = theta.device
    shape = theta.shape if rows is None else (len(rows), *theta.shape[1:])
    out = torch.empty(math.prod(shape) + shift, dtype=theta.dtype, device=device)[shift:].view(shape)
    module.scratch(
        theta,
        out,
        TENSOR_ID,
        seed_tensor(2**64 - 3, device),
        torch.tensor(coef, device=device),
        None if scale is None else torch.tensor(scale, device=device),
        None if nearest_above is None else torch.tensor(nearest_above, device=device),
        None if rows is None else torch.tensor(rows, dtype=torch.int64, device=device),
        dist,
    )
    return out.cpu()


@pytest.mark.parametrize("nearest_above", [None, 1e-3, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scratch_equals_the_reference(target, dtype, nearest_above):
    """The step is -2e-3: below 1.0 it rounds stochastically, above 1e-3 to nearest."""
    theta = torch.randn((37, 113), generator=torch.Generator().manual_seed(4)).to(dtype)
    place = theta.to(target.device)
    options = {"scale": 0.5, "nearest_above": nearest_above}
    expected = perturbed(reference, theta, -4e-3, "rademacher", **options)
    assert torch.equal(perturbed(target.backend, place, -4e-3, "rademacher", **options), expected)
    assert torch.equal(place.cpu(), theta)
    normal = perturbed(target.backend, place, -4e-3, "normal", **options)
    error = 2e-3 * (2e-5 if target.device.type == "cpu" else 7e-4)
    assert_within(normal, perturbed(reference, theta, -4e-3, "normal", **options), error)
    assert torch.equal(perturbed(target.backend, place, -4e-3, "normal", shift=1, **options), normal)
    to_nearest = perturbed(reference, theta, -4e-3, "rademacher", scale=0.5)
    assert torch.equal(expected, to_nearest) == (dtype == torch.float32 or nearest_above != 1.0)


@pytest.mark.parametrize("shape", [(12, 128), (8, 384), (16, 33), (40,), (40, 3, 7)], ids=str)
def test_scratch_of_rows_is_a_part_of_the_whole(target, monkeypatch, shape):
    """Rows that begin inside a span, repeat, or have any width: the noise and rounding of their place."""
    monkeypatch.setattr(target.backend, "BLOCK", 256)
    monkeypatch.setattr(target.backend, "SPAN", 512)
    theta = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    rows = [shape[0] - 1, 0, 7, 7, 2]
    expected = perturbed(reference, theta, 1e-3, "rademacher", nearest_above=1.0, rows=rows)
    place = theta.to(target.device)
    for shift in (0, 1):
        options = {"nearest_above": 1.0, "shift": shift}
        assert torch.equal(
            perturbed(target.backend, place, 1e-3, "rademacher", rows=rows, **options), expected
        )
    whole = perturbed(target.backend, place, 1e-3, "normal", nearest_above=1.0)
    part = perturbed(target.backend, place, 1e-3, "normal", nearest_above=1.0, rows=rows)
    assert torch.equal(part, whole[rows])


def test_one_launch_per_dtype_and_tables_built_once(interpreted):
    blocks = Blocks([(f"block{i}", tensor) for i, tensor in enumerate(mixed("cpu"))])
    tables = interpreted._tables(blocks)
    assert sorted(str(group.dtype) for group in tables.groups) == sorted(map(str, DTYPES))
    assert interpreted._tables(blocks) is tables
    tensors, offsets = misfits("cpu")
    strided = interpreted._tables(Blocks([(str(i), t) for i, t in enumerate(tensors)], offsets=offsets))
    assert not any(group.aligned for group in strided.groups)
    assert {group.dims for group in strided.groups} == {0, 2, 3}


def test_chunks_are_cut_at_multiples_in_the_global_index(interpreted, monkeypatch):
    monkeypatch.setattr(interpreted, "CHUNK", 1024)
    assert interpreted._chunks(2048, 0).tolist() == [0, 1024]
    assert interpreted._chunks(2049, 0).tolist() == [0, 1024, 2048]
    assert interpreted._chunks(2000, 2**35 - 131).tolist() == [-125, 131, 1155]


def test_a_replaced_storage_is_found(target):
    """`param.data = ...` after the tables were built: the new storage is written, the old one is not."""
    parameter = torch.nn.Parameter(torch.ones(300, device=target.device), requires_grad=False)
    blocks = Blocks([("weight", parameter)])
    arguments = (
        seed_tensor([1], target.device),
        torch.ones(1, device=target.device),
        None,
        None,
        None,
        "rademacher",
    )
    target.backend.axpy_(blocks, *arguments)
    old, kept = parameter.data, parameter.data.clone()
    parameter.data = torch.ones(300, device=target.device)
    target.backend.axpy_(blocks, *arguments)
    assert torch.equal(old, kept)
    assert torch.equal(parameter.data, kept)


def test_nothing_to_do_launches_nothing(target):
    device = target.device
    empty = Blocks([("empty", torch.empty(0, 4, device=device))])
    for blocks in (Blocks([]), empty):
        target.backend.axpy_(
            blocks, seed_tensor([1], device), torch.ones(1, device=device), None, None, None, "normal"
        )
    assert perturbed(target.backend, torch.ones(3, 4, device=device), 1.0, "normal", rows=[]).shape == (0, 4)
    assert words(target.backend, 0, 1, 0, 0, device).shape == (0, 4)
    assert noise(target.backend, 0, 1, 0, "normal", device).shape == (0,)


def test_block_stats_equal_the_reference(target, monkeypatch):
    monkeypatch.setattr(target.backend, "STATS", 1000)
    tensors = [*mixed(target.device), *misfits(target.device)[0]]
    blocks = Blocks([(str(i), tensor) for i, tensor in enumerate(tensors)])
    ours, theirs = (torch.full((2, len(blocks)), math.nan, device=target.device) for _ in range(2))
    target.backend.block_stats(blocks, ours[0], ours[1])
    reference.block_stats(blocks, theirs[0], theirs[1])
    assert torch.allclose(ours, theirs, rtol=1e-7, atol=1e-12)


def test_cpu_tensors_are_refused_outside_the_interpreter():
    backend = importlib.import_module("zo_kernels.backends.triton")
    if not backend.HARDWARE.value:
        pytest.skip("TRITON_INTERPRET is set")
    with pytest.raises(ValueError, match="needs cuda tensors, got cpu"):
        backend.noise(torch.empty(8), seed_tensor(1), 1, 0, "normal")
