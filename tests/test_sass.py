"""The machine code of the Triton kernels for an H100/H200 (sm_90) and an A100 (sm_80), compiled without a
GPU: 16-byte accesses, no spills, instructions per element, and how many kernels a run compiles."""

from __future__ import annotations

import contextlib

import pytest
import torch

from zo_kernels.blocks import Blocks, BlockStats
from zo_kernels.forms import Form, below, shifted, weighted
from zo_kernels.ops import seed_tensor
from zo_kernels.rules import RULES

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)

from bench.sass import CUOBJDUMP, Kernel, accesses, offline, per_element  # noqa: E402
from zo_kernels.backends import triton as backend  # noqa: E402

needs_cuobjdump = pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this triton wheel has no cuobjdump")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _cpu_tensors_pass(monkeypatch):
    monkeypatch.setattr(backend.launch, "on", lambda device: contextlib.nullcontext())


def blocks_of(dtypes, shift=0, view=None) -> Blocks:
    """A tensor of each dtype, `shift` elements off its 16-byte boundary."""
    tensors = [torch.empty(4096 + shift, dtype=dtype)[shift:] for dtype in dtypes]
    return Blocks([(f"theta{i}", t if view is None else view(t)) for i, t in enumerate(tensors)])


def stats_of(stats: bool, count: int) -> BlockStats | None:
    return BlockStats.empty(count, torch.device("cpu")) if stats else None


def dist(signs: bool) -> str:
    return "rademacher" if signs else "normal"


def form_of(name: str | None, tensors) -> Form | None:
    """Of a list of tensors, or of one."""
    several = isinstance(tensors, list)
    state = [torch.empty(t.shape) for t in tensors] if several else torch.empty(tensors.shape)
    if name == "below":
        return below(torch.ones(len(tensors) if several else ()))
    return {None: None, "weighted": weighted(state), "shifted": shifted(state, torch.tensor(0.5))}[name]


def axpy(
    *dtypes, count=1, shift=0, decay=False, stochastic=False, per_direction=False, signs=False, view=None, stats=False,
    form=None,
):  # fmt: skip
    blocks = blocks_of(dtypes or [BF16], shift, view)
    size = len(blocks)
    backend.axpy_(
        blocks,
        seed_tensor(range(count)),
        torch.ones(count),
        torch.ones((count, size) if per_direction else size),
        torch.tensor(0.5) if decay else None,
        seed_tensor(3) if stochastic else None,
        dist(signs),
        stats_of(stats, size),
        form_of(form, blocks.tensors),
    )


def state(rule, *dtypes, count=1, shift=0, numel=4096, form=None, small=1.0, keep=True):
    """A step by a rule: decay, stochastic rounding, a step that may not be kept."""
    tensors = [torch.empty(numel + shift, dtype=dtype)[shift:] for dtype in dtypes or [BF16]]
    blocks = Blocks([(f"theta{i}", tensor) for i, tensor in enumerate(tensors)])
    kind, value = RULES[rule], torch.tensor(small)
    backend.update_state_(
        blocks,
        rule,
        [[torch.empty(numel) for _ in tensors] for _ in kind.states],
        seed_tensor(range(count)),
        torch.full((count,), small),
        torch.ones(len(blocks)),
        torch.full((len(kind.numbers) + kind.per_direction * count,), small),
        form_of(form, tensors),
        value,
        seed_tensor(3),
        torch.tensor(keep),
        "normal",
    )


def scratch(
    dtype=BF16, *, shift=0, rows=None, width=128, stochastic=False, signs=False, mirror=False, stats=False, tensor_id=7,
    count=1, form=None,
):  # fmt: skip
    """`scratch` of a (32, width) tensor."""
    theta = torch.empty(32 * width + shift, dtype=dtype)[shift:].view(32, width)
    out = torch.empty((32 if rows is None else len(rows), width), dtype=dtype)
    backend.scratch(
        theta,
        out,
        torch.empty_like(out) if mirror else None,
        tensor_id,
        seed_tensor(range(count)),
        torch.full((count,), 1e-3),
        torch.tensor(1.0),
        torch.tensor(0.1) if stochastic else None,
        None if rows is None else torch.tensor(rows),
        dist(signs),
        stats_of(stats, 1),
        form_of(form, theta),
    )


def update_scratch(
    dtype=BF16, *, count=1, numel=4096, stochastic=True, mirror=True, stats=False, tensor_id=7, small=1.0
):
    """The update rounds stochastically, and so may the scratch."""
    theta, seeds = torch.empty(numel, dtype=dtype), seed_tensor(range(tensor_id % 1000, tensor_id % 1000 + count))
    value = torch.tensor(small)
    backend.update_scratch_(
        theta,
        torch.empty_like(theta),
        torch.empty_like(theta) if mirror else None,
        tensor_id,
        *(seeds, torch.full((count,), small), value, None, seeds[0]),
        *(seeds[0], value, value, value if stochastic else None),
        "normal",
        stats_of(stats, 1),
    )


def dot(*dtypes, count=1, shift=0, signs=False, stats=False):
    blocks = blocks_of(dtypes or [BF16], shift)
    out = torch.empty(count, len(blocks))
    backend.dot_noise(blocks, seed_tensor(range(count)), out, dist(signs), stats_of(stats, len(blocks)))


def statistics(*dtypes, shift=0):
    blocks = blocks_of(dtypes or [BF16], shift)
    backend.block_stats(blocks, stats_of(True, len(blocks)))


# The loops over whole tiles, every access of 16 bytes: name -> (launch, bytes read per element, most instructions
# per element, largest loop first: the second is a scratch to nearest, another dtype, or further directions of a dot).
# Counted with Triton 3.9.0 / 3.6.0 (one number: 3.9.0); the ceilings leave about 3 %.  At 4 bytes an element an H200
# issues 31 instructions in the time of its memory, at 2 bytes 15.5, at 6 bytes 46.6, at 8 bytes 62.
BODIES = {
    "axpy bf16": (lambda: axpy(), 2, [17]),  # 15.6 / 16.2
    "axpy bf16, decay": (lambda: axpy(decay=True), 2, [17.7]),  # 16.6 / 17.2
    "axpy bf16, stochastic": (lambda: axpy(stochastic=True), 2, [24]),  # 23.4 / 23.4
    "axpy bf16, stochastic, statistics": (lambda: axpy(stochastic=True, stats=True), 2, [29.3]),  # 28.4 / 28.4
    "axpy bf16, 2 directions": (lambda: axpy(count=2), 2, [29]),  # 28.1 / 28.4
    "axpy bf16, 2 directions, statistics": (lambda: axpy(count=2, stats=True), 2, [34.4]),  # 33.4 / 33.4
    "axpy bf16, 2 directions, stochastic": (lambda: axpy(count=2, stochastic=True), 2, [36.6]),  # 35.6 / 35.2
    "axpy bf16, signs": (lambda: axpy(signs=True), 2, [11]),  # 10.1 / 10.6
    "axpy bf16, signs, stochastic": (lambda: axpy(signs=True, stochastic=True), 2, [18.6]),  # 17.9 / 18.1
    "axpy fp16": (lambda: axpy(FP16), 2, [16.2]),  # 15.1 / 15.7
    "axpy fp16, stochastic": (lambda: axpy(FP16, stochastic=True), 2, [31]),  # 29.8 / 30.2
    "axpy fp32": (lambda: axpy(FP32), 4, [15.8]),  # 15.3 / 15.3
    "axpy fp32, 2 directions": (lambda: axpy(FP32, count=2), 4, [29.4]),  # 28.4 / 28.5
    "scratch bf16": (lambda: scratch(), 2, [17]),  # 16.3 / 16.5
    "scratch bf16, mirror": (lambda: scratch(mirror=True), 2, [19]),  # 18.1 / 18.5
    "scratch bf16, stochastic": (lambda: scratch(stochastic=True), 2, [24.3, 17]),  # 23.5 / 23.6
    "scratch bf16, stochastic, mirror": (lambda: scratch(stochastic=True, mirror=True), 2, [28.3, 19]),  # 27.5 / 27.4
    "scratch bf16, stochastic, mirror, statistics": (
        lambda: scratch(stochastic=True, mirror=True, stats=True), 2, [31.5, 22.3]),  # 30.6 / 30.6
    "scratch bf16 rows, stochastic, mirror": (
        lambda: scratch(rows=[3], stochastic=True, mirror=True), 2, [28.2, 18.8]),  # 27.3 / 27.3
    "scratch fp16, stochastic, mirror": (
        lambda: scratch(FP16, stochastic=True, mirror=True), 2, [40.3, 18.5]),  # 38.9 / 39.1
    "scratch fp32, mirror": (lambda: scratch(FP32, mirror=True), 4, [18]),  # 17.4 / 17.4
    "update and scratch bf16": (lambda: update_scratch(mirror=False), 2, [47.4, 40.2]),  # 46.0 / 46.0
    "update and scratch bf16, mirror": (lambda: update_scratch(), 2, [51.5, 42.2]),  # 49.9 / 50.0
    "update and scratch bf16, mirror, statistics": (
        lambda: update_scratch(stats=True), 2, [54.6, 45.5]),  # 53.0 / 52.8
    "update and scratch fp32, mirror": (lambda: update_scratch(FP32), 4, [34.5]),  # 33.5 / 33.5
    "scratch bf16, 2 directions, stochastic, mirror": (
        lambda: scratch(count=2, stochastic=True, mirror=True), 2, [41.9, 32.1]),  # 40.6
    "scratch bf16, weighted, stochastic, mirror": (
        lambda: scratch(form="weighted", stochastic=True, mirror=True), 6, [58.9, 49.2]),  # 57.1
    "axpy bf16, weighted, stochastic": (lambda: axpy(form="weighted", stochastic=True), 6, [55.2]),  # 53.5
    "axpy bf16, below, stochastic": (lambda: axpy(form="below", stochastic=True), 2, [26.2]),  # 25.4
    "axpy bf16, shifted, stochastic": (lambda: axpy(form="shifted", stochastic=True), 6, [25.8]),  # 24.9
    "dot bf16": (lambda: dot(), 2, [15.9]),  # 14.8 / 15.4
    "dot bf16, statistics": (lambda: dot(stats=True), 2, [19.2, 15.9]),  # 18.3 / 18.6
    "dot fp32": (lambda: dot(FP32), 4, [15.7]),  # 15.2 / 15.1
    "statistics bf16": (lambda: statistics(), 2, [5.6]),  # 5.4 / 5.4
    "statistics fp16": (lambda: statistics(FP16), 2, [4.9]),  # 4.8 / 4.8
    "statistics fp32": (lambda: statistics(FP32), 4, [4.3]),  # 4.1 / 4.1
}  # fmt: skip

# The same for rules that keep state: fp32 states beside theta, so instructions per element of a tile are counted by the
# 16-byte stores: (launch, bytes stored per element, ceiling).  Their times of memory, at 31 instructions for 4 bytes:
# 93 for one state, 155 for two, 217 for three.
RULE_BODIES = {
    "momentum": (lambda: state("momentum"), 6, 29.7),  # 28.8
    "adam": (lambda: state("adam"), 10, 84.5),  # 82.0: two quotients and a root, rounded once
    "adam, weighted": (lambda: state("adam", form="weighted"), 10, 116),  # 112.5
    "adamm": (lambda: state("adamm"), 14, 73.5),  # 71.3
    "sign": (lambda: state("sign"), 2, 29.3),  # 28.4
    "sign-ema": (lambda: state("sign-ema"), 6, 33.8),  # 32.8
    "curvature": (lambda: state("curvature"), 6, 62.6),  # 60.8
    "shifted-mean, 2 directions": (lambda: state("shifted-mean", count=2), 6, 43.3),  # 42.0
    "momentum fp32": (lambda: state("momentum", FP32), 8, 21.4),  # 20.8
}

# Any number of directions: seeds and coefficients are read for every tile, so not all loads have 16 bytes.
# The masked forms: 2-byte accesses.  name -> (launch, kind of access, bytes of it, ceiling)
OTHERS = {
    "axpy bf16, any number, stochastic": (lambda: axpy(count=5, stochastic=True), "STG", 16, 28.6),  # 27.8 / 27.9
    "axpy bf16, misaligned, stochastic": (lambda: axpy(shift=1, stochastic=True), "STG", 2, 40.6),  # 39.4 / 39.3
    "axpy bf16, transposed": (lambda: axpy(view=lambda x: x.view(64, 64).t()), "STG", 2, 120),
    "scratch bf16, misaligned": (lambda: scratch(shift=1), "STG", 2, 30),
    "scratch bf16 rows of 33": (lambda: scratch(rows=[3], width=33), "STG", 2, 31),
    "scratch bf16, 5 directions, mirror": (
        lambda: scratch(count=5, mirror=True),
        "STG",
        16,
        12.5,
    ),  # 12.0, a half of each element
    "shifted-mean bf16, 5 directions": (lambda: state("shifted-mean", count=5), "STG", 16, 14.4),  # a third
    "dot bf16, misaligned": (lambda: dot(shift=1), "LDG", 2, 28),
    "statistics bf16, misaligned": (lambda: statistics(shift=1), "LDG", 2, 17.1),  # 11.9 / 16.6
}


def compiled(launch, folder, capability=90) -> Kernel:
    """The kernel that walks the tensors (further launches are second stages)."""
    with offline(capability) as launches:
        launch()
    return Kernel(launches[0][1], folder)


def bodies(kernel: Kernel) -> list:
    """The loops over whole tiles: nothing is loaded but 16 bytes at a time."""
    return [loop for loop in kernel.loops if set(accesses(loop, "LDG")) == {16}]


@needs_cuobjdump
@pytest.mark.parametrize("name", BODIES)
def test_the_body_moves_16_bytes_and_keeps_to_its_instructions(name, tmp_path):
    launch, itemsize, ceilings = BODIES[name]
    kernel = compiled(launch, tmp_path)
    counts = [per_element(body, itemsize, "LDG") for body in bodies(kernel)]
    assert len(counts) == len(ceilings)
    assert all(count <= ceiling for count, ceiling in zip(counts, ceilings, strict=True)), counts
    assert all(set(accesses(body, "STG")) <= {16} for body in bodies(kernel))
    assert not kernel.spills()
    # 5 or 4 blocks of 128 threads on a multiprocessor of 65,536 registers
    assert kernel.registers <= (128 if name.startswith(("update", "dot")) or "weighted" in name else 96)


@needs_cuobjdump
@pytest.mark.parametrize("name", RULE_BODIES)
def test_a_rule_moves_16_bytes_and_keeps_to_its_instructions(name, tmp_path):
    launch, stored, ceiling = RULE_BODIES[name]
    kernel = compiled(launch, tmp_path)
    (body,) = bodies(kernel)
    assert set(accesses(body, "STG")) == {16}
    assert per_element(body, stored) <= ceiling
    assert not kernel.spills()
    assert kernel.registers <= 128  # 4 blocks of 128 threads on a multiprocessor


@needs_cuobjdump
def test_a_rule_on_any_address_does_not_spill(tmp_path):
    kernel = compiled(lambda: state("adamm", shift=1, form="shifted"), tmp_path)
    assert not kernel.spills() and {2} < set(accesses(kernel.instructions, "LDG"))


@needs_cuobjdump
def test_a_mixed_list_has_the_bodies_of_its_dtypes(tmp_path):
    kernel = compiled(lambda: axpy(BF16, FP32, stochastic=True), tmp_path)
    sixteen, thirty_two = bodies(kernel)
    assert per_element(sixteen, 2, "LDG") <= BODIES["axpy bf16, stochastic"][2][0]
    assert per_element(thirty_two, 4, "LDG") <= BODIES["axpy fp32"][2][0]
    assert not kernel.spills()


@needs_cuobjdump
@pytest.mark.parametrize("name", OTHERS)
def test_the_other_forms_do_not_spill(name, tmp_path):
    launch, kind, size, ceiling = OTHERS[name]
    kernel = compiled(launch, tmp_path)
    loops = [loop for loop in kernel.loops if set(accesses(loop, kind)) == {size}]
    assert not kernel.spills()
    assert per_element(loops[0], 2, kind) <= ceiling, f"{per_element(loops[0], 2, kind):.2f}"


@needs_cuobjdump
@pytest.mark.parametrize(
    "launch",
    [lambda: axpy(stochastic=True, stats=True), lambda: update_scratch(), lambda: dot(stats=True)],
    ids=["axpy", "update and scratch", "dot"],
)
def test_the_body_is_the_same_shape_on_sm_80(launch, tmp_path):
    kernel = compiled(launch, tmp_path, capability=80)
    assert bodies(kernel) and not kernel.spills()
    assert all(set(accesses(body, "STG")) <= {16} for body in bodies(kernel))


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


def test_one_launch_for_a_list_and_one_for_each_kind_of_misfit(monkeypatch):
    launched = []
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", lambda kernel, *a, **k: launched.append(kernel.__name__))

    def names(launch):
        launched.clear()
        launch()
        return list(launched)

    every = (BF16, FP16, FP32)
    assert names(lambda: axpy(*every)) == ["axpy_kernel"]
    assert names(lambda: axpy(*every, stats=True)) == ["axpy_kernel", "statistics_kernel"]
    assert names(lambda: state("adamm", *every, form="weighted")) == ["state_kernel"]
    assert names(lambda: dot(*every, count=3)) == ["read_kernel", "sum_kernel"]
    assert names(lambda: statistics(*every)) == ["read_kernel", "statistics_kernel"]
    assert names(lambda: scratch(mirror=True)) == ["scratch_kernel"]
    assert names(lambda: update_scratch(stats=True)) == ["scratch_kernel", "statistics_kernel"]
    blocks = blocks_of(every)
    odd = [torch.empty(4097)[1:], torch.empty(64, 64).t(), torch.empty(64, 64).t()]
    blocks = Blocks([*zip(blocks.names, blocks.tensors, strict=True), *zip("abc", odd, strict=True)])
    assert backend.misfits(blocks) == ["a", "b", "c"]
    assert names(lambda: backend.block_stats(blocks, stats_of(True, 6))) == ["read_kernel"] * 3 + ["statistics_kernel"]


def kernels(launches) -> int:
    return len({id(kernel) for _, kernel in launches})


def test_what_changes_from_step_to_step_compiles_nothing():
    """Seeds, coefficients, scales (of blocks, of directions and blocks), sizes, ids, offsets and the alignment of the
    small tensors."""
    small, seeds = torch.ones(64), seed_tensor(range(20))
    names = [f"layer{i}" for i in range(3)]
    out, stats = torch.empty(64), stats_of(True, 3)
    with offline() as launches:
        for numel, ids, offset in ((1, (1, 16, 2**32 - 1), 0), (4096, (0, 2, 3), 128), (100_000, (5, 6, 7), 2**33)):
            tensors = [(name, torch.empty(numel, dtype=BF16)) for name in names]
            blocks = Blocks(tensors, ids=dict(zip(names, ids, strict=True)), offsets=[offset] * 3)
            for k in (1, 2, 4, 16):
                for scale in (small[k : k + 3], small[k : k + 3].view(1, 3)):
                    step = (seeds[k : k + 1], small[k : k + 1], scale, small[k], seeds[k])
                    backend.axpy_(blocks, *step, "normal", None)
                    backend.axpy_(blocks, *step, "normal", stats)
                backend.dot_noise(blocks, seeds[:k], out[: 3 * k].view(k, 3), "normal", None)
                backend.dot_noise(blocks, seeds[k : k + 1], out[k : k + 3].view(1, 3), "normal", stats)
            backend.block_stats(blocks, stats)
    # axpy and dot, each with and without statistics, the statistics; two second stages
    assert kernels(launches) == 7 and len(launches) > 100
    with offline() as launches:
        for count in (3, 4, 16):
            axpy(count=count)
            axpy(count=count, per_direction=True)
        axpy(FP32, stochastic=True)
        axpy(FP32)
    assert kernels(launches) == 2  # fp32 has nothing to round


def test_a_rule_compiles_once():
    """Numbers, sizes, states, and whether a step is kept, change nothing."""
    with offline() as launches:
        for numel, small, keep in ((1, 0.0, True), (100_000, 1.0, False), (4096, 1e-8, True), (16, 16.0, True)):
            state("adam", numel=numel, small=small, keep=keep, form="shifted")
            state("momentum", count=3, numel=numel, small=small)
            state("momentum", count=16, numel=numel, small=small)
    assert kernels(launches) == 2 and len(launches) == 12
    with offline() as launches:
        for count in (3, 4, 16):
            scratch(count=count)
    assert kernels(launches) == 1


def test_scratches_noise_and_words_compile_once():
    out, seed = torch.empty(2**18), seed_tensor(range(20))
    with offline() as launches:
        for tensor_id in (0, 1, 16, 2**32 - 1):
            for width in (128, 4096):
                scratch(width=width, tensor_id=tensor_id, stochastic=True)
    assert kernels(launches) == 1 and len(launches) == 8
    with offline() as launches:
        for tensor_id, numel, small in ((0, 1, 0.5), (1, 100_000, 1.0), (16, 4096, 2.0), (2**32 - 1, 2**20, 1e-8)):
            update_scratch(tensor_id=tensor_id, numel=numel, small=small)
    assert kernels(launches) == 1 and len(launches) == 4
    with offline() as launches:
        for tensor_id, start in ((0, 0), (1, 1), (16, 2**31), (2**32 - 1, 2**40)):
            for numel in (1, 16, 2**18):
                backend.noise(out[:numel], seed[tensor_id % 20], tensor_id, start, "normal", tensor_id % 4)
    assert kernels(launches) == 1 and len(launches) == 12
    with offline() as launches:
        for tensor_id, stream, group in ((0, 0, 0), (1, 1, 1), (2**32 - 1, 2**32 - 1, 2**40), (16, 16, -16)):
            backend.words(torch.empty((5, 4), dtype=torch.int32), seed[stream % 20], tensor_id, stream, group)
    assert kernels(launches) == 1 and len(launches) == 4
