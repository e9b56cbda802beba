"""What is measured, a function per group of measurements; `kernels` puts them in order for a CPU or a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bench.operations import EPS, Call, Tensors, list_calls, mezo_calls, tensor_calls
from bench.rule_calls import rule_calls, torch_calls
from bench.runner import Runner
from bench.shapes import Shapes
from zo_kernels import Blocks, draw_noise, seed_tensor, use_backend

ROTATE = 256e6  # bytes that small tensors are rotated over: four times an L2 of 60 MB
CAPTURE = 64e6  # bytes of a tensor below which a launch takes as long as the kernel: captured in a graph


def weights(named: Shapes, dtype: torch.dtype, device: torch.device) -> list[tuple[str, Tensor]]:
    """Random weights of a usual size; a kernel that is fast on zeros only would show."""
    return [(name, torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02)) for name, shape in named]


def bandwidth(runner: Runner, dtype: torch.dtype, n: int, foil: bool, when: str = "") -> None:
    """The two floors: a copy (bytes read plus bytes written), and on a GPU a read.  `when` ends their names where they
    are measured once more."""
    source = torch.empty(n, dtype=dtype, device=runner.device).normal_()
    target = torch.empty_like(source)
    size = n * source.element_size()
    runner.time(f"copy{when}", "copy", dtype, n, lambda: target.copy_(source), moved=2 * size)
    if foil:
        from bench.foils import CHUNK, read

        sink = torch.empty(size // 4 // CHUNK, dtype=torch.int32, device=runner.device)
        runner.time(f"read{when}", "copy", dtype, n, lambda: read(source, sink), moved=size, floor="read")


def _times(runner: Runner, passes: dict[str, Call], dtype: torch.dtype, n: int, **options) -> None:
    for case, call in passes.items():
        moved = (call.accesses * dtype.itemsize + 8 * call.states) * n
        floor = call.floor if call.floor in runner.bandwidth else "copy"
        for provider in runner.stats if case == "stats" else (runner.ours,):
            with use_backend(provider):
                runner.time(case, provider, dtype, n, call.run, moved=moved, floor=floor, **options)


def list_passes(runner: Runner, named: Shapes, dtype: torch.dtype, foil: bool) -> None:
    """Every pass over a model's parameters, then torch's operators on the same weights."""
    held = weights(named, dtype, runner.device)
    n = sum(tensor.numel() for _, tensor in held)
    _times(runner, list_calls(Blocks(held)), dtype, n)
    if foil:
        from bench.foils import randn

        coef = torch.tensor(EPS, device=runner.device)
        tensors = [tensor for _, tensor in held]
        runner.time("perturb", "randn", dtype, n, lambda: randn(tensors, coef), moved=2 * n * dtype.itemsize)
        del tensors
    # p.data = ... frees a weight as it replaces it only where nothing else holds it: 30B weights are there once.
    parameters = [torch.nn.Parameter(tensor, requires_grad=False) for _, tensor in held]
    held.clear()
    for case, run in mezo_calls(parameters).items():
        runner.time(case, "torch", dtype, n, run)


def rule_passes(runner: Runner, named: Shapes, dtype: torch.dtype) -> None:
    """An update by every rule, its states with it."""
    held = weights(named, dtype, runner.device)
    n = sum(tensor.numel() for _, tensor in held)
    _times(runner, rule_calls(Blocks(held)), dtype, n)
    for case, run in torch_calls([tensor for _, tensor in held]).items():
        runner.time(case, "torch", dtype, n, run)


def tensor_passes(runner: Runner, numel: int, dtype: torch.dtype, rotate: float) -> None:
    """Every op of a single tensor, beside a copy of that tensor, which is then the floor.  rotate: bytes that all the
    sets of weights and results have together, at least; 0 for one set."""
    size = numel * dtype.itemsize
    count = max(1, math.ceil(rotate / (2 * size)))

    def buffer() -> Tensor:
        return torch.empty(numel, dtype=dtype, device=runner.device).normal_(0, 0.02)

    sets = [Tensors(buffer(), buffer(), buffer()) for _ in range(count)]
    captured = rotate > 0 and size < CAPTURE
    floors, runner.bandwidth = runner.bandwidth, {}

    def wrapped(run: Callable[[], object]) -> Callable[[], object]:
        return runner.clock.captured(run) if captured else run

    with runner.about(**({"captured": True} if captured else {})):
        copies = Call(lambda: [t.out.copy_(t.theta) for t in sets], 2)
        with runner.guard(f"copy of {size / 1e6:.0f} MB"):
            runner.time("copy", "copy", dtype, numel, wrapped(copies.run), moved=2 * size, calls=count)
        for case, call in tensor_calls(sets).items():
            with runner.guard(f"{case} of {size / 1e6:.0f} MB, captured"), use_backend(runner.ours):
                call.run()  # compiled before a capture
                _times(runner, {case: Call(wrapped(call.run), call.accesses)}, dtype, numel, calls=count)
    runner.bandwidth = floors


def tiny_calls(runner: Runner, named: Shapes, dtype: torch.dtype) -> None:
    """What a call costs apart from its bytes: a list of these names with 64 elements each."""
    held = weights([(name, (64,)) for name, _ in named], dtype, runner.device)
    parameters = [torch.nn.Parameter(tensor.clone(), requires_grad=False) for _, tensor in held]
    ours, theirs = list_calls(Blocks(held)), mezo_calls(parameters)
    timed = [(case, runner.ours, ours[case].run) for case in ("perturb", "update")]
    timed += [("stats", provider, ours["stats"].run) for provider in runner.stats]
    timed += [("perturb", "torch", theirs["perturb"])]
    for case, provider, run in timed:
        with use_backend(runner.ours if provider == "torch" else provider):
            runner.time(f"tiny {case}", provider, dtype, 64 * len(held), run)
            runner.time(f"tiny {case}, host", provider, dtype, 64 * len(held), run, host=True)


def draws(runner: Runner, n: int) -> None:
    """The noise alone, written as fp32."""
    seed = seed_tensor(5, runner.device)
    with use_backend(runner.ours):
        for dist in ("normal", "rademacher"):
            case = "draw" if dist == "normal" else "draw rademacher"
            run = lambda dist=dist: draw_noise(n, seed, 7, dist=dist)  # noqa: E731
            runner.time(case, runner.ours, torch.float32, n, run)
    runner.time("draw", "torch", torch.float32, n, lambda: torch.randn(n, device=runner.device))
