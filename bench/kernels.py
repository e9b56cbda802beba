"""Every op against what the machine can move and against torch's operators, side by side in one process.

    copy, read            the floors: the same bytes, moved only
    passes over a model   perturb, update, two-noise, statistics, noise dots          (operations.list_calls)
    rules                 updates by momentum, Adam, sign, ...: theta and fp32 states  (rule_calls)
    passes over a tensor  scratch, its mirror, the update that ends in a scratch      (operations.tensor_calls)
    torch                 the operators of MeZO's code on the same weights
    randn                 a perturbation with Triton's own generator
    tiny                  a model's list with 64 elements a tensor: what a call costs
    same z, twin          whether all passes draw the same bits, and how far they are from the CPU's

Rows are medians with p20 and p80; `share` is bytes moved per second as a part of the floor's, measured in the same run.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable, Iterator

import torch

from bench import agreement, passes
from bench.runner import BudgetSpent, Runner
from bench.shapes import CONFIGS, numel, shapes
from zo_kernels import BACKENDS, why_unavailable

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
ELEMENTS = 1 << 24  # of a CPU measurement: 32 to 64 MB, past any cache level of its class
COPIED = 1 << 33  # bytes of each buffer of the GPU's copy

# Tensors of real models: 2, 8, 34, 103, 117, 411 and 1,051 MB in 16 bits.
TENSORS = (
    ("llama-8b", "model.embed_tokens.weight"),
    ("llama-8b", "model.layers.0.mlp.gate_proj.weight"),
    ("opt-30b", "model.decoder.layers.0.fc1.weight"),
    ("llama-8b", "model.layers.0.self_attn.q_proj.weight"),
    ("llama-1b", "model.layers.0.self_attn.k_proj.weight"),
    ("opt-30b", "model.decoder.layers.0.self_attn.q_proj.weight"),
    ("llama-1b", "model.layers.0.self_attn.q_proj.weight"),
)

Stage = tuple[str, Callable[[], None]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no measurement after this time")
    parser.add_argument("--numel", type=int, help=f"CPU: elements (default {ELEMENTS}, with --quick 2^20)")
    parser.add_argument("--provider", choices=BACKENDS[:3], help="the backend (default: cpu, or triton on a GPU)")


def run(arguments: argparse.Namespace) -> int:
    """0; 1 when a measurement failed or there is no such device."""
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        print("kernels: torch sees no CUDA device; --device cpu measures this machine")
        return 1
    ours = arguments.provider or ("triton" if device.type == "cuda" else "cpu")
    if reason := why_unavailable(ours):
        print(f"kernels: {reason}")
        return 1
    stats = [ours]
    if device.type == "cuda" and why_unavailable("cuda") is None:
        stats.insert(0, "cuda")
    runner = Runner(
        arguments.out / "kernels.jsonl", device, ours, stats, 5 if arguments.quick else 21, arguments.budget
    )
    if device.type == "cuda":
        small = {"shrink": 16, "copied": COPIED // 16, "rotate": passes.ROTATE / 16} if arguments.quick else {}
        return measure(runner, gpu_stages(runner, **small))
    keep_pages()
    return measure(runner, cpu_stages(runner, arguments.numel or (1 << 20 if arguments.quick else ELEMENTS)))


def measure(runner: Runner, stages: Iterator[Stage]) -> int:
    """Runs the stages in order until the budget is spent, and says what was left out."""
    print(f"{'op':<22}{'provider':<10}{'dtype':<10}{'of':<28}{'median':>14}", flush=True)
    try:
        for name, stage in stages:
            with runner.guard(name):
                stage()
            if runner.device.type == "cuda":
                torch.cuda.empty_cache()
    except BudgetSpent as spent:
        left = [name for name, _ in stages]
        print(f"budget spent before {spent}; left out: {', '.join(left) or 'nothing more'}")
    if runner.failed:
        print(f"{len(runner.failed)} failed: {'; '.join(runner.failed)}")
    return 1 if runner.failed else 0


def cpu_stages(runner: Runner, n: int) -> Iterator[Stage]:
    """One block of n elements per dtype."""

    def dtype_stage(dtype: torch.dtype) -> None:
        passes.bandwidth(runner, dtype, n, foil=False)
        passes.list_passes(runner, [("theta", (n,))], dtype, foil=False)
        passes.tensor_passes(runner, n, dtype, rotate=0)

    for dtype in (FLOAT32, BFLOAT16, FLOAT16):
        yield str(dtype), lambda dtype=dtype: dtype_stage(dtype)
    for dtype in (FLOAT32, BFLOAT16):
        yield f"rules in {dtype}", lambda dtype=dtype: passes.rule_passes(runner, [("theta", (n,))], dtype)
    yield "draws", lambda: passes.draws(runner, n)
    yield "tiny calls", lambda: tiny(runner, ELEMENTS // n)
    yield "same z", lambda: agreement.same_z(runner, min(n, 1 << 20) + 5)
    yield "twin", lambda: agreement.twin(runner, min(n, 1 << 20))
    yield "changed", lambda: agreement.changed(runner, n)


def gpu_stages(
    runner: Runner, shrink: int = 1, copied: int = COPIED, rotate: float = passes.ROTATE, foil: bool = True
) -> Iterator[Stage]:
    """Most valuable first.  shrink divides the models' widths and depths; copied: bytes of each buffer of the copy;
    rotate: bytes that small tensors are rotated over; foil: the Triton kernels of `foils` beside ours."""
    yield "bandwidth", lambda: passes.bandwidth(runner, BFLOAT16, copied // 2, foil)
    yield "same z", lambda: agreement.same_z(runner, (1 << 24) // shrink + 5)
    yield "twin", lambda: agreement.twin(runner, (1 << 22) // shrink)

    def lists(model: str, dtype: torch.dtype) -> Stage:
        def stage() -> None:
            with runner.about(model=model):
                passes.list_passes(runner, shapes(model, shrink), dtype, foil)

        return f"{model} in {dtype}", stage

    def tensor(model: str, name: str, dtype: torch.dtype) -> Stage:
        shape = dict(shapes(model, shrink))[name]

        def stage() -> None:
            with runner.about(tensor=f"{model} {'x'.join(map(str, shape))}"):
                passes.tensor_passes(runner, numel([(name, shape)]), dtype, rotate)

        return f"{model} {name} in {dtype}", stage

    def rules() -> None:
        with runner.about(model="llama-1b"):
            passes.rule_passes(runner, shapes("llama-1b", shrink), BFLOAT16)

    yield lists("llama-1b", BFLOAT16)
    for model, name in TENSORS[:3]:
        yield tensor(model, name, BFLOAT16)
    yield lists("llama-8b", BFLOAT16)
    yield lists("opt-30b", BFLOAT16)
    yield "tiny calls", lambda: tiny(runner, shrink)
    for model, name in TENSORS[3:]:
        yield tensor(model, name, BFLOAT16)
    yield "rules", rules
    yield lists("llama-1b", FLOAT16)
    for model, name in TENSORS[:2]:
        yield tensor(model, name, FLOAT16)
    yield "draws", lambda: passes.draws(runner, (1 << 26) // shrink)
    for model in list(CONFIGS)[1:]:
        yield lists(model, FLOAT16)
    yield lists("llama-1b", FLOAT32)
    yield "changed", lambda: agreement.changed(runner, (1 << 24) // shrink)
    # Clocks and temperature may have moved since the first.
    yield "bandwidth at the end", lambda: passes.bandwidth(runner, BFLOAT16, copied // 2, foil, " at the end")


def tiny(runner: Runner, shrink: int = 1) -> None:
    with runner.about(model="llama-8b"):
        passes.tiny_calls(runner, shapes("llama-8b", shrink), BFLOAT16)


def keep_pages() -> None:
    """No mmap for large buffers (glibc's M_MMAP_MAX = -4, M_TRIM_THRESHOLD = -1): torch's temporaries then cost no page
    faults, which on a virtual machine double its time.  The comparison is with torch at its best."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(-4, 0)
    mallopt(-1, 2**31 - 1)
