"""A whole step against the published order of operations and against bare inference (`providers`), in one process.

Providers take turns on the same batches of real rows, so that what disturbs the machine disturbs all of them.  The
published ones have a copy of the model, and low rank has one; where those do not fit the device they take their turns
on the same model, after ours.  Rows: seconds of a step, measured peak memory and what `zo plan` says of it, the share
of each phase.

    --model-like      models by shape alone, their weights drawn on the device (`folders`)
    --tokens N        besides the tasks' batches, one of as many BoolQ rows as fill N tokens
    --trace FILE      a step of ours as torch.profiler sees it
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.folders import make_folder
from bench.memory import capacity, peak_bytes
from bench.providers import PROVIDERS, Batch, Setup, Step
from bench.rows import append, machine, spread
from bench.shapes import CONFIGS
from bench.shares import phase_shares, write_trace
from zo_finetuner.cli import keep_large_buffers
from zo_finetuner.data import load_splits
from zo_finetuner.encoding import Encoded, collate, context_length, encode_rows, pad_token
from zo_finetuner.errors import InputError
from zo_finetuner.isolation import can_pack
from zo_finetuner.loading import DTYPES, load_model
from zo_finetuner.plan import make_plan
from zo_finetuner.tasks import get_task

TASKS, FILLING = ("sst2", "boolq", "squad", "drop"), "boolq"
BATCHES, LEAST_TURNS = 8, 3
FULL = 0.9  # of the device's memory, what tensors may take beside fragments and the context


@dataclass(frozen=True)
class Case:
    """One set of rows: batches of `size` rows of a task, or of as many as fill `tokens`."""

    model: str
    task: str
    size: int
    tokens: int = 0

    def __str__(self) -> str:
        return f"{self.model}, {self.task}, " + (f"{self.tokens} tokens" if self.tokens else f"batch {self.size}")


@dataclass(frozen=True)
class Loaded:
    """source: where the model's config is."""

    source: str
    model: nn.Module
    tokenizer: Any
    packed: bool
    device: torch.device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared = Path(os.environ.get("ZO_DATA", "../shared"))
    parser.add_argument("--shared", type=Path, default=shared, help="development data (models, rows)")
    parser.add_argument("--model", default="imdb-llama-6m", help="a folder, or a name under SHARED/models")
    parser.add_argument("--model-like", nargs="+", choices=CONFIGS, metavar="SHAPE", default=[],
                        help=f"instead: random weights of {', '.join(CONFIGS)}, with the tokenizer of --model")
    parser.add_argument("--shrink", type=int, default=1, help="divide their widths and depths, for dry runs")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: the config's (shapes: bfloat16)")
    parser.add_argument("--task", nargs="*", default=TASKS)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, help=f"besides, a batch of {FILLING} that fills so many tokens")
    parser.add_argument("--provider", nargs="+", choices=PROVIDERS, help="default: all that the device has")
    parser.add_argument("--probing", default="auto", help="of our engine")
    parser.add_argument("--repeats", type=int, help="steps of each provider; default 18 (--quick: 3)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="shared by the cases; begin none after it")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write the trace of a step of the first case")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")


def run(arguments: argparse.Namespace) -> int:
    """0; 1 when a case failed."""
    keep_large_buffers()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.provider is None:
        arguments.provider = [name for name, p in PROVIDERS.items() if device.type == "cuda" or not p.graphs]
    end = None if arguments.budget is None else time.monotonic() + arguments.budget
    models, trace, failed = arguments.model_like or [arguments.model], arguments.trace, []
    left = [case for model in models for case in _cases(arguments, model)]
    with tempfile.TemporaryDirectory() as work:
        for model in models:
            loaded = None
            gc.collect()  # the last model goes before the next one comes
            while left and left[0].model == model:
                if end is not None and time.monotonic() > end:
                    print(f"budget spent; left out: {'; '.join(map(str, left))}")
                    return 1 if failed else 0
                limit = None if end is None else (end - time.monotonic()) / len(left)
                case = left.pop(0)
                try:
                    loaded = loaded or _load(arguments, model, Path(work), device)
                    _measure_case(arguments, case, loaded, limit, trace)
                    trace = None
                except Exception as error:
                    failed.append(case)
                    reason = (str(error).splitlines() or [""])[0]
                    print(f"FAILED {case}: {type(error).__name__}: {reason}", flush=True)
    return 1 if failed else 0


def _cases(arguments: argparse.Namespace, model: str) -> list[Case]:
    """Most valuable first: the first task, the filled batch, the other tasks."""
    found = [Case(model, task, arguments.batch_size) for task in arguments.task]
    if arguments.tokens:
        found.insert(1, Case(model, FILLING, 0, arguments.tokens))
    return found


def _load(arguments: argparse.Namespace, name: str, work: Path, device: torch.device) -> Loaded:
    folder = arguments.shared / "models" / arguments.model
    source = folder if folder.is_dir() else Path(arguments.model)
    shaped = name in arguments.model_like
    if shaped:
        source = make_folder(name, work / name, source, arguments.shrink)
    model, tokenizer = load_model(str(source), arguments.dtype, random_weights=shaped)
    model.to(device).eval()
    return Loaded(str(source), model, tokenizer, can_pack(model), device)


def _batches(case: Case, loaded: Loaded, shared: Path, count: int) -> list[Batch]:
    task = get_task(case.task)
    needed = case.tokens * count // 64 if case.tokens else case.size * count
    rows = load_splits(task, str(shared / "data" / case.task), num_train=max(needed, 1), num_dev=1, num_eval=1).train
    encoded = encode_rows(task, rows, loaded.tokenizer, context_length(loaded.model))
    groups = fill(encoded, case.tokens) if case.tokens else [
        encoded[i : i + case.size] for i in range(0, len(encoded) - case.size + 1, case.size)
    ]  # fmt: skip
    if not groups:
        raise InputError(f"{case}: {len(encoded)} rows are fewer than a batch")
    pad = pad_token(loaded.tokenizer)
    few = loaded.device.type == "cuda"  # as zo train lays them out where steps are graphs
    laid = [collate(group, pad, packed=loaded.packed, few_shapes=few) for group in groups[:count]]
    return [
        Batch(group, {name: tensor.to(loaded.device) for name, tensor in batch.items()})
        for group, batch in zip(groups, laid, strict=False)
    ]


def fill(rows: Sequence[Encoded], tokens: int) -> list[list[Encoded]]:
    """Groups of consecutive rows, each with as many as `tokens` hold; the last, unfinished one is left out."""
    groups, group, taken = [], [], 0
    for row in rows:
        size = len(row.sequences[row.labels[0]])
        if group and taken + size > tokens:
            groups.append(group)
            group, taken = [], 0
        group.append(row)
        taken += size
    return groups


def _measure_case(
    arguments: argparse.Namespace, case: Case, loaded: Loaded, limit: float | None, trace: Path | None
) -> None:
    started, device = time.monotonic(), loaded.device
    repeats = arguments.repeats or (3 if arguments.quick else 18)
    batches = _batches(case, loaded, arguments.shared, min(repeats + 1, BATCHES))
    rows = len(batches[0].rows)
    setup = Setup(loaded.model, pad_token(loaded.tokenizer), rows, arguments.probing)
    common = {
        "case": "step", "dtype": str(loaded.model.dtype).removeprefix("torch."), "n": rows,
        "model": case.model, "task": case.task, "tokens": sum(b.tokens for b in batches) / len(batches),
        **({"filled": case.tokens} if case.tokens else {}),
        **({"shrink": arguments.shrink} if arguments.shrink > 1 else {}), **machine(device.type),
    }  # fmt: skip
    print(f"\n{case}: {rows} rows, {common['tokens']:.0f} tokens, {common['dtype']}, {common['device']}, "
          f"{common.get('threads', '-')} threads", flush=True)

    def record(provider: str, metric: str, unit: str, values: Sequence[float], **extra: Any) -> None:
        row = common | {"provider": provider, "metric": metric, "unit": unit} | extra | spread(list(values))
        append(arguments.out / "step.jsonl", row)

    peaks: dict[str, int] = {}
    for name in arguments.provider:
        try:
            peaks[name] = peak_bytes(PROVIDERS[name], setup, batches[:2], device)
        except torch.OutOfMemoryError:
            print(f"  {name} is left out: it does not fit {capacity(device) / 2**30:.0f} GiB", flush=True)
            continue
        record(name, "peak_bytes", "B", [peaks[name]])
    planned = _planned(arguments, case, loaded.source, common)
    for name, size in planned.items():
        record(name, "planned_bytes", "B", [size])

    gc.collect()
    medians: dict[str, float] = {}

    def take_turns(setups: dict[str, Setup]) -> None:
        """A function of its own: the engines go with it, and with them their hold on the weights' memory."""
        steps = {name: PROVIDERS[name].make(setup) for name, setup in setups.items()}
        left = None if limit is None else (limit - (time.monotonic() - started)) * len(steps) / len(peaks)
        for name, values in measure(steps, batches, repeats, device, left).items():
            medians[name] = spread(values)["p50"]
            record(name, "time_s", "s", values)
        for name, step in steps.items():
            shares = phase_shares(step, batches[: 3 if limit is None else 1], device)
            for part, share in shares.items():
                record(name, "share", "", [share], phase=part)
            _print(name, medians, peaks, planned, shares)
        if trace is not None and "zo_finetuner" in steps:
            write_trace(steps["zo_finetuner"], batches[0], trace, device)
            print(f"  {trace}: a step of zo_finetuner")

    for setups in rounds(setup, list(peaks), max(peaks.values()), device):
        take_turns(setups)
        gc.collect()


def _planned(arguments: argparse.Namespace, case: Case, source: str, common: dict[str, Any]) -> dict[str, int]:
    """Peak bytes by `zo plan` for rows of the mean length: what a user would be told."""
    found: dict[str, int] = {}
    for name in arguments.provider:
        if optimizer := PROVIDERS[name].optimizer:
            plan = make_plan(source, task=case.task, batch=common["n"], seq=-(-round(common["tokens"]) // common["n"]),
                             optimizer=optimizer, dtype=common["dtype"],
                             probing="auto" if PROVIDERS[name].collects else arguments.probing)  # fmt: skip
            found |= {"inference": plan.memory.inference, name: plan.memory.peak}
    return found


def rounds(setup: Setup, names: Sequence[str], peak: int, device: torch.device) -> Iterator[dict[str, Setup]]:
    """The providers that take turns together, each with its model: all, with copies for those that move the weights
    and for each that collects; or where the device has no room for those, ours, after them each that collects, and the
    others last, on the same model.  peak: of the one that needs most."""
    ours = [name for name in names if not PROVIDERS[name].moves and not PROVIDERS[name].collects]
    collecting = [name for name in names if PROVIDERS[name].collects]
    movers = [name for name in names if PROVIDERS[name].moves]
    weights, copies = sum(p.nbytes for p in setup.model.parameters()), len(collecting) + bool(movers)

    def copied() -> Setup:
        return replace(setup, model=copy.deepcopy(setup.model))

    if not copies or peak + copies * weights <= FULL * capacity(device):
        moved = dict.fromkeys(movers, copied()) if movers else {}
        yield dict.fromkeys(ours, setup) | {name: copied() for name in collecting} | moved
        return
    print(f"  the others take their turns after ours: the device has no room for a second model of "
          f"{weights / 2**30:.1f} GiB", flush=True)
    for together in (ours, *([name] for name in collecting), movers):
        if together:
            yield dict.fromkeys(together, setup)


def measure(
    steps: dict[str, Step], batches: list[Batch], repeats: int, device: torch.device, limit: float | None = None
) -> dict[str, list[float]]:
    """Seconds of every step.  The turns end after `repeats`, or, three of them taken, after `limit` seconds."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for name in steps:
        if PROVIDERS[name].graphs:
            for batch in batches * 3:
                steps[name](batch)
    began = time.monotonic()
    for number in range(repeats + 1):
        if limit is not None and number > LEAST_TURNS and time.monotonic() - began > limit:
            break
        batch, turn = batches[number % len(batches)], number % len(steps)
        for name, step in [*steps.items()][turn:] + [*steps.items()][:turn]:  # who comes first pays for cold caches
            wait()
            started = time.perf_counter()
            step(batch)
            wait()
            if number:  # the first turn warms up
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _print(name: str, medians: dict[str, float], peaks: dict[str, int], planned: dict[str, int],
           shares: dict[str, float]) -> None:  # fmt: skip
    line = f"  {name:<24}{medians[name] * 1e3:>10.1f} ms"
    if "inference" in medians:
        plan = f", plan {planned[name] / planned['inference']:.3f}x" if name in planned else ""
        line += f"{medians[name] / medians['inference']:>8.2f}x two forwards"
        line += f", peak {peaks[name] / peaks['inference']:.3f}x inference{plan}"
    parts = ", ".join(f"{part} {share:.0%}" for part, share in shares.items() if share >= 0.005)
    print(f"{line} ({parts})", flush=True)
