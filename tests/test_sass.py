"""The machine code of the Triton kernels for an H100/H200 (sm_90) and an A100 (sm_80), compiled without a
GPU: 16-byte accesses, no spills, instructions per element, and how many kernels a run compiles."""

from __future__ import annotations

import contextlib

import pytest
import torch

from zo_kernels.blocks import Blocks
from zo_kernels.ops import seed_tensor

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)

from bench.sass import CUOBJDUMP, Kernel, accesses, offline, per_element  # noqa: E402

from zo_kernels.backends import triton as backend  # noqa: E402

needs_cuobjdump = pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this triton wheel has no cuobjdump")


@pytest.fixture(autouse=True)
def _cpu_tensors_pass(monkeypatch):
    monkeypatch.setattr(backend, "_on", lambda device: contextlib.nullcontext())


def axpy(
    dtype=torch.bfloat16,
    count=1,
    *,
    shift=0,
    decay=False,
    stochastic=False,
    scaled=True,
    signs=False,
    view=None,
):
    """Launch `axpy_` on one tensor, `shift` elements off its 16-byte boundary."""
    theta = torch.empty(4096 + shift, dtype=dtype)[shift:]
    backend.axpy_(
        Blocks([("theta", theta if view is None else view(theta))]),
        seed_tensor(range(count)),
        torch.ones(count),
        torch.ones(1) if scaled else None,
        torch.tensor(0.5) if decay else None,
        seed_tensor(3) if stochastic else None,
        "rademacher" if signs else "normal",
    )


def scratch(
    dtype=torch.bfloat16, *, shift=0, rows=None, width=128, stochastic=False, signs=False, tensor_id=7
):
    """Launch `scratch` on a (32, width) tensor."""
    theta = torch.empty(32 * width + shift, dtype=dtype)[shift:].view(32, width)
    backend.scratch(
        theta,
        torch.empty((32 if rows is None else len(rows), width), dtype=dtype),
        tensor_id,
        seed_tensor(3),
        torch.tensor(1e-3),
        torch.tensor(1.0),
        torch.tensor(0.1) if stochastic else None,
        None if rows is None else torch.tensor(rows),
        "rademacher" if signs else "normal",
    )


# Counted with Triton 3.9.0 / 3.6.0; the ceilings leave about 3 %.
# 16-byte body: name -> (launch, itemsize, ceiling of instructions per element)
BODIES = {
    "axpy bf16": (lambda: axpy(), 2, 17),  # 15.6 / 16.7
    "axpy bf16, decay": (lambda: axpy(decay=True), 2, 18.2),  # 16.6 / 17.7
    "axpy bf16, stochastic": (lambda: axpy(stochastic=True), 2, 24),  # 23.4 / 23.9
    "axpy bf16, 2 directions, stochastic": (lambda: axpy(count=2, stochastic=True), 2, 37),
    "axpy bf16, signs, stochastic": (lambda: axpy(signs=True, stochastic=True), 2, 18.6),  # 17.9 / 18.1
    "axpy bf16, signs": (lambda: axpy(signs=True), 2, 11),  # 10.1 / 10.6
    "axpy fp16": (lambda: axpy(torch.float16), 2, 16.7),  # 15.1 / 16.2
    "axpy fp16, stochastic": (lambda: axpy(torch.float16, stochastic=True), 2, 38.3),  # 36.4 / 37.2
    "axpy fp32": (lambda: axpy(torch.float32), 4, 16.3),  # 15.3 / 15.8
    "scratch bf16": (lambda: scratch(), 2, 17.5),  # 16.3 / 17.0
    "scratch bf16, stochastic": (lambda: scratch(stochastic=True), 2, 24.9),  # 23.5 / 24.1
    "scratch bf16 rows, stochastic": (lambda: scratch(rows=[3], stochastic=True), 2, 24.9),  # 23.4 / 24.0
    "scratch fp32": (lambda: scratch(torch.float32), 4, 16.7),  # 15.5 / 16.2
}

# Any number of directions: seeds and coefficients are read for every tile, so not all loads have 16 bytes.
# The masked forms: 2-byte accesses.  name -> (launch, ceiling)
OTHERS = {
    "axpy bf16, any number, stochastic": (lambda: axpy(count=5, stochastic=True), 28.3),  # 26.9 / 27.4
    "axpy bf16, misaligned, stochastic": (lambda: axpy(shift=1, stochastic=True), 41),  # 39.4 / 39.8
    "axpy bf16, transposed": (lambda: axpy(view=lambda x: x.view(64, 64).t()), 120),
    "scratch bf16, misaligned": (lambda: scratch(shift=1), 30),
    "scratch bf16 rows of 33": (lambda: scratch(rows=[3], width=33), 31),
}


def compiled(launch, folder, capability=90) -> Kernel:
    with offline(capability) as launches:
        launch()
    ((_, kernel),) = launches
    return Kernel(kernel, folder)


@needs_cuobjdump
@pytest.mark.parametrize("name", BODIES)
def test_the_body_moves_16_bytes_and_keeps_to_its_instructions(name, tmp_path):
    launch, itemsize, ceiling = BODIES[name]
    kernel = compiled(launch, tmp_path)
    for body in kernel.loops:  # two where a scratch chooses between nearest and stochastic
        assert set(accesses(body, "LDG")) == set(accesses(body, "STG")) == {16}
        assert per_element(body, itemsize) <= ceiling, f"{per_element(body, itemsize):.2f}"
    assert not kernel.spills()
    assert kernel.registers <= 96  # 5 blocks of 128 threads on a multiprocessor of 65,536 registers


@needs_cuobjdump
@pytest.mark.parametrize("name", OTHERS)
def test_the_other_forms_do_not_spill(name, tmp_path):
    launch, ceiling = OTHERS[name]
    kernel = compiled(launch, tmp_path)
    assert not kernel.spills()
    assert per_element(kernel.loops[0], 2) <= ceiling, f"{per_element(kernel.loops[0], 2):.2f}"
    assert set(accesses(kernel.loops[0], "STG")) == ({16} if "any" in name else {2})


@needs_cuobjdump
@pytest.mark.parametrize("launch", [lambda: axpy(stochastic=True), lambda: scratch(stochastic=True)])
def test_the_body_is_the_same_shape_on_sm_80(launch, tmp_path):
    kernel = compiled(launch, tmp_path, capability=80)
    assert set(accesses(kernel.loops[0], "LDG")) == set(accesses(kernel.loops[0], "STG")) == {16}
    assert not kernel.spills()


def test_nothing_is_contracted_or_flushed(tmp_path):
    """fp32 operations per tile of 16 elements a thread: u and angle per word, one fma per element.  Another
    fma would be a contraction, `.ftz` outside the four approximations a flush to zero."""
    ptx = compiled(lambda: axpy(decay=True, stochastic=True), tmp_path).ptx
    tiles = 2  # body and tail
    assert ptx.count("fma.rn.f32") == tiles * (8 + 8 + 16)
    products = tiles * (16 + 8 + 16) + 1  # decay, 2 ln 2, radius * cos and sin; coef * scale
    assert ptx.count("mul.f32") + ptx.count("mul.rn.f32") == products
    flushing = {line.split()[0] for line in ptx.splitlines() if ".ftz" in line}
    assert flushing == {f"{op}.approx.ftz.f32" for op in ("lg2", "sqrt", "sin", "cos")}


def test_what_changes_from_step_to_step_compiles_nothing():
    """Seeds, coefficients, scales, sizes, ids, offsets and the alignment of the small tensors."""
    small = torch.ones(64)
    names = [f"layer{i}" for i in range(3)]
    with offline() as launches:
        for numel, ids, offset in (
            (1, (1, 16, 2**32 - 1), 0),
            (4096, (0, 2, 3), 128),
            (100_000, (5, 6, 7), 2**33),
        ):
            blocks = Blocks(
                [(name, torch.empty(numel, dtype=torch.bfloat16)) for name in names],
                ids=dict(zip(names, ids, strict=True)),
                offsets=[offset] * 3,
            )
            for k in (1, 2, 4, 16):
                seeds, coefs, scale = seed_tensor(range(20))[k : k + 1], small[k : k + 1], small[k : k + 3]
                backend.axpy_(blocks, seeds, coefs, scale, small[k], seed_tensor(range(20))[k], "normal")
    assert len({id(kernel) for _, kernel in launches}) == 1 and len(launches) == 12
    with offline() as launches:
        for count in (3, 4, 16):
            axpy(count=count)
        axpy(torch.float32, stochastic=True)
        axpy(torch.float32)
    assert len({id(kernel) for _, kernel in launches}) == 2  # fp32 has nothing to round


def test_scratch_noise_and_words_compile_once():
    out, seed = torch.empty(2**18), seed_tensor(range(20))
    with offline() as launches:
        for tensor_id in (0, 1, 16, 2**32 - 1):
            for width in (128, 4096):
                scratch(width=width, tensor_id=tensor_id, stochastic=True)
    assert len({id(kernel) for _, kernel in launches}) == 1 and len(launches) == 8
    with offline() as launches:
        for tensor_id, start in ((0, 0), (1, 1), (16, 2**31), (2**32 - 1, 2**40)):
            for numel in (1, 16, 2**18):
                backend.noise(out[:numel], seed[tensor_id % 20], tensor_id, start, "normal")
    assert len({id(kernel) for _, kernel in launches}) == 1 and len(launches) == 12
    with offline() as launches:
        for tensor_id, stream, group in ((0, 0, 0), (1, 1, 1), (2**32 - 1, 2**32 - 1, 2**40), (16, 16, -16)):
            backend.words(torch.empty((5, 4), dtype=torch.int32), seed[stream % 20], tensor_id, stream, group)
    assert len({id(kernel) for _, kernel in launches}) == 1 and len(launches) == 4
