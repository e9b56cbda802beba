"""A whole step against the published order of operations and against bare inference, side by side in one process.

    inference                two bare forwards of our own fast form of the batch: the floor of any two-point method
    zo_finetuner             our engine with MeZO (`--probing` says how the weights are perturbed)
    zo_finetuner_learned     our engine with per-block networks (fresh ones: the time is the same)
    reference_noise          the published sweeps over the weights around our one-prompt forward
    mezo_reference           MeZO's published order: every candidate a sequence, full logits, four sweeps
    zo_finetuner_reference   the published ZO Fine-tuner: besides, statistics and a network per tensor, one by one

Providers take turns on the same batches, so that what disturbs the machine disturbs all of them.  Batches are of
real rows.  Rows: seconds of a step, peak memory on a GPU, and the share of each phase of ours (`phase`).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bench.published import PublishedMeZO, PublishedZOFineTuner, option_loss
from bench.rows import append, machine, spread
from zo_finetuner.cli import keep_large_buffers
from zo_finetuner.data import load_splits
from zo_finetuner.encoding import Encoded, collate, context_length, encode_rows, pad_token
from zo_finetuner.engine import Engine
from zo_finetuner.isolation import can_pack
from zo_finetuner.loading import load_model
from zo_finetuner.objective import training_loss
from zo_finetuner.optim import make_method
from zo_finetuner.pertnn import PertNN
from zo_finetuner.tasks import get_task

EPS, LR, SEED = 1e-3, 1e-7, 0
PHASES = ("ask", "probe", "forward", "tell", "update")


@dataclass
class Batch:
    """A batch as rows (the published form) and as our tensors on the device."""

    rows: list[Encoded]
    ours: dict[str, torch.Tensor]

    @property
    def tokens(self) -> int:
        """Of the rows as a user counts them: each with its correct option, once."""
        return sum(len(row.sequences[row.labels[0]]) for row in self.rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="development data (models, rows)")
    parser.add_argument("--model", default="imdb-llama-6m", help="a folder, or a name under SHARED/models")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--task", nargs="+", default=["sst2", "boolq", "drop"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--probing", default="auto", help="of our engine")
    parser.add_argument("--repeats", type=int, help="steps of each provider; default 18 (--quick: 3)")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")


def run(arguments: argparse.Namespace) -> int:
    keep_large_buffers()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for task in arguments.task:
        _task(arguments, task, device)
    return 0


def _task(arguments: argparse.Namespace, task_name: str, device: torch.device) -> None:
    folder = arguments.shared / "models" / arguments.model
    task = get_task(task_name)
    model, tokenizer = load_model(str(folder if folder.is_dir() else arguments.model), arguments.dtype)
    model.to(device).eval()
    repeats = arguments.repeats or (3 if arguments.quick else 18)
    needed = arguments.batch_size * min(repeats + 1, 8)
    rows = load_splits(task, str(arguments.shared / "data" / task_name), num_train=needed, num_dev=1, num_eval=1).train
    encoded = encode_rows(task, rows, tokenizer, min(512, context_length(model)))
    packed = can_pack(model)
    batches = [_batch(encoded[i : i + arguments.batch_size], tokenizer, device, packed)
               for i in range(0, len(encoded) - arguments.batch_size + 1, arguments.batch_size)]
    steps = providers(model, pad_token(tokenizer), arguments.batch_size, arguments.probing)

    common = {
        "case": "step", "dtype": arguments.dtype, "n": arguments.batch_size,
        "model": arguments.model, "task": task_name,
        "tokens": sum(b.tokens for b in batches) / len(batches), **machine(device.type),
    }  # fmt: skip
    out = arguments.out / "step.jsonl"
    seconds, peaks = measure(steps, batches, repeats, device)
    for name, values in seconds.items():
        append(out, common | {"provider": name, "metric": "time_s", "unit": "s"} | spread(values))
        if name in peaks:
            append(out, common | {"provider": name, "metric": "peak_bytes", "unit": "B"} | spread([peaks[name]]))
    shares = phase_shares(steps["zo_finetuner"], batches[: 3 if arguments.quick else 8])
    for name, share in shares.items():
        row = {"provider": "zo_finetuner", "metric": "share", "unit": "", "phase": name}
        append(out, common | row | spread([share]))
    _print(common, seconds, peaks, shares)


def _batch(rows: list[Encoded], tokenizer, device: torch.device, packed: bool) -> Batch:
    batch = collate(rows, pad_token(tokenizer), packed=packed)
    return Batch(rows, {name: t.to(device) for name, t in batch.items()})


def providers(model: nn.Module, pad_id: int, batch_size: int, probing: str) -> dict[str, Callable[[Batch], object]]:
    """Name -> one step on a batch.  The published steps give every parameter new memory at every sweep, so they have a
    copy of the model to themselves; a rate of 1e-7 leaves both what they are."""
    other = copy.deepcopy(model)

    def ours(batch: Batch, model: nn.Module = model) -> torch.Tensor:
        total, weight = training_loss(model, batch.ours)
        return total / weight

    @torch.no_grad()
    def inference(batch: Batch) -> None:
        ours(batch)
        ours(batch)

    names = [name for name, p in model.named_parameters() if p.requires_grad]
    nets = PertNN.fresh(names).to(next(model.parameters()).device)
    mezo = Engine(model, make_method("mezo", model), eps=EPS, seed=SEED, probing=probing)
    learned = make_method("zo-finetuner", model, batch_size=batch_size)
    learned = Engine(model, learned, eps=EPS, seed=SEED, probing=probing)
    published = PublishedMeZO(other, lr=LR, eps=EPS)
    published_nets = PublishedZOFineTuner(other, nets, batch_size=batch_size, lr=LR, eps=EPS)
    numbers = itertools.count()
    return {
        "inference": inference,
        "zo_finetuner": lambda b: mezo.step(lambda: ours(b), LR),
        "zo_finetuner_learned": lambda b: learned.step(lambda: ours(b), LR),
        "reference_noise": lambda b: published.step(lambda: ours(b, other), next(numbers)),
        "mezo_reference": lambda b: published.step(lambda: option_loss(other, b.rows, pad_id), next(numbers)),
        "zo_finetuner_reference":
            lambda b: published_nets.step(lambda: option_loss(other, b.rows, pad_id), next(numbers)),
    }  # fmt: skip


def measure(
    steps: dict[str, Callable[[Batch], object]], batches: list[Batch], repeats: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every step, and on a GPU each provider's peak memory in bytes."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, int] = {}
    for number in range(repeats + 1):
        batch, turn = batches[number % len(batches)], number % len(steps)
        for name, step in [*steps.items()][turn:] + [*steps.items()][:turn]:  # who comes first pays for cold caches
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            wait()
            started = time.perf_counter()
            step(batch)
            wait()
            if number:  # the first turn warms up
                seconds[name].append(time.perf_counter() - started)
            if device.type == "cuda":
                peaks[name] = max(peaks.get(name, 0), torch.cuda.max_memory_allocated())
    return seconds, peaks


def phase_shares(step: Callable[[Batch], object], batches: list[Batch]) -> dict[str, float]:
    """Share of a step's host time in each phase (`zo_finetuner.phases`), the forward taken out of its probe."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for batch in batches:
            with torch.profiler.record_function("zo.step"):
                step(batch)
    spent = {e.key.removeprefix("zo."): e.cpu_time_total for e in profile.key_averages() if e.key.startswith("zo.")}
    total = spent.pop("step")
    spent["probe"] -= spent["forward"]
    shares = {name: spent.get(name, 0) / total for name in PHASES}
    return shares | {"other": 1 - sum(shares.values())}


def _print(common: dict, seconds: dict[str, list[float]], peaks: dict[str, int], shares: dict[str, float]) -> None:
    print(f"\n{common['task']}, {common['model']}, {common['dtype']}, batch {common['n']} "
          f"({common['tokens']:.0f} tokens), {common['device']}, {common.get('threads', '-')} threads")
    median = {name: spread(values)["p50"] for name, values in seconds.items()}
    for name, value in median.items():
        peak = f"{peaks[name] / 2**30:8.2f} GiB" if name in peaks else ""
        print(f"  {name:<24}{value * 1e3:>9.1f} ms{value / median['inference']:>8.2f}x two forwards"
              f"{median['mezo_reference'] / value:>8.2f}x faster than MeZO's order{peak}")
    print("  a step of ours: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
