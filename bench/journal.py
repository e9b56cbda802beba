"""What a journal costs a step, and how fast a run is rebuilt from it: training with and without one in turns on the
same batches, then the replay of that run, whose weights have to be those of the run.

Rows, by phase: `train` and `train+journal` (seconds of a step), `journal` (seconds of a step spent on it, bytes),
`replay` (seconds of a step).  `filled`: steps of batches with so many tokens; a replay does not see the batch.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.rows import append, machine, spread
from bench.step import fill
from zo_finetuner.cli import keep_large_buffers
from zo_finetuner.data import load_splits
from zo_finetuner.encoding import Encoded, collate, context_length, encode_rows, pad_token
from zo_finetuner.engine import Engine
from zo_finetuner.isolation import can_pack
from zo_finetuner.journal import read_journal
from zo_finetuner.loading import load_model
from zo_finetuner.objective import training_loss
from zo_finetuner.optim import make_method
from zo_finetuner.recorder import Recorder
from zo_finetuner.replay import replay
from zo_finetuner.tasks import get_task

RATE, EPS, REPLAYS = 1e-6, 1e-3, 3
FILLED = 4000  # tokens


class Timed(Recorder):
    """A recorder that knows the seconds it took."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.seconds = 0.0


def _timed(name: str) -> Callable:
    def method(self: Timed, *args: Any) -> None:
        started = time.perf_counter()
        getattr(Recorder, name)(self, *args)
        self.seconds += time.perf_counter() - started

    return method


for _name in ("before", "take", "after"):
    setattr(Timed, _name, _timed(_name))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared = Path(os.environ.get("ZO_DATA", "../shared"))
    parser.add_argument("--shared", type=Path, default=shared, help="development data (models, rows)")
    parser.add_argument("--model", default="imdb-llama-6m", help="a folder, or a name under SHARED/models")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="probed in place, and in a scratch")
    parser.add_argument("--optimizer", nargs="+", default=["mezo", "zo-finetuner"])
    parser.add_argument("--steps", type=int, help="of the run; default 128 (--quick: 16)")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")


def run(arguments: argparse.Namespace) -> int:
    """1 where a replay has other weights than its run."""
    keep_large_buffers()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    steps, failed = arguments.steps or (16 if arguments.quick else 128), False
    folder = arguments.shared / "models" / arguments.model
    for dtype in arguments.dtype:
        base, tokenizer = load_model(str(folder if folder.is_dir() else arguments.model), dtype)
        if arguments.device:
            base.to(arguments.device)
        batches = {task: _batches(base, tokenizer, arguments.shared, task) for task in ("sst2", "boolq")}
        for optimizer in arguments.optimizer:
            common = {"case": "journal", "provider": optimizer, "dtype": dtype, "model": arguments.model,
                      "steps": steps, **machine(base.device.type)}  # fmt: skip
            record = partial(_record, arguments.out / "journal.jsonl", common)
            failed |= not _measure(base, optimizer, batches, steps, record)
    return int(failed)


def _batches(model: nn.Module, tokenizer: Any, shared: Path, task: str) -> list[dict]:
    """Batches of 16 rows of SST-2, or of BoolQ rows that fill `FILLED` tokens."""
    loaded = load_splits(get_task(task), str(shared / "data" / task), num_train=256, num_dev=1, num_eval=1).train
    rows = encode_rows(get_task(task), loaded, tokenizer, context_length(model))
    groups: Sequence[list[Encoded]] = (
        [rows[i : i + 16] for i in range(0, 128, 16)] if task == "sst2" else fill(rows, FILLED)[:4]
    )
    laid = [collate(group, pad_token(tokenizer), packed=can_pack(model)) for group in groups]
    return [{name: tensor.to(model.device) for name, tensor in batch.items()} for batch in laid]


def _measure(base: nn.Module, optimizer: str, batches: dict, steps: int, record: Callable) -> bool:
    """Whether the replay has the weights of the run."""
    wait = torch.cuda.synchronize if base.device.type == "cuda" else lambda: None
    with tempfile.TemporaryDirectory() as folder:
        recorder = Timed(Path(folder) / "journal.zoj")
        plain, written = (_engine(base, optimizer, journal) for journal in (None, recorder))
        seconds: dict[str, list[float]] = {"train": [], "train+journal": [], "journal": []}
        for step in range(steps):
            batch = batches["sst2"][step % len(batches["sst2"])]
            turns = [("train", plain), ("train+journal", written)]
            for phase, engine in turns if step % 2 else turns[::-1]:
                recorder.seconds = 0.0
                taken = _step(engine, batch, wait)
                if step:  # the first step opens the file, and warms up
                    seconds[phase].append(taken)
                    if engine is written:
                        seconds["journal"].append(recorder.seconds)
        recorder.close()
        filled = [_step(plain, batch, wait) for batch in batches["boolq"]][1:]
        journal = read_journal(recorder.path)
        replays = []
        for _ in range(REPLAYS):
            model = copy.deepcopy(base)
            started = time.perf_counter()
            replay(model, journal)
            wait()
            replays.append((time.perf_counter() - started) / steps)
    same = all(torch.equal(one, other) for one, other in zip(_weights(model), _weights(written.model), strict=True))
    for phase, values in {**seconds, "replay": replays}.items():
        record(phase, "time_s", "s", values, n=16, task="sst2")
    record("train", "time_s", "s", filled, n=len(batches["boolq"][0]["input_ids"]), task="boolq", filled=FILLED)
    record("journal", "bytes", "B", [journal.header.record.size], n=16, task="sst2")
    train, long, again = (spread(values)["p50"] for values in (seconds["train"], filled, replays))
    share = spread(seconds["journal"])["p50"] / train
    print(f"{optimizer}, {base.dtype}: a step {train * 1e3:.1f} ms (SST-2), {long * 1e3:.0f} ms ({FILLED} tokens); "
          f"journal {share:.2%} of it, {journal.header.record.size} bytes; replay {again * 1e3:.2f} ms, "
          f"{train / again:.1f}x and {long / again:.0f}x as fast; the weights {'are' if same else 'ARE NOT'} the run's",
          flush=True)  # fmt: skip
    return same


def _engine(base: nn.Module, optimizer: str, journal: Recorder | None) -> Engine:
    model = copy.deepcopy(base)
    return Engine(model, make_method(optimizer, model), eps=EPS, journal=journal)


def _step(engine: Engine, batch: dict, wait: Callable[[], None]) -> float:
    def loss() -> torch.Tensor:
        total, weight = training_loss(engine.model, batch)
        return total / weight

    wait()
    started = time.perf_counter()
    engine.step(loss, RATE)
    wait()
    return time.perf_counter() - started


def _weights(model: nn.Module) -> Iterator[torch.Tensor]:
    return iter(model.state_dict().values())


def _record(path: Path, common: dict, phase: str, metric: str, unit: str, values: list[float], **extra: Any) -> None:
    append(path, common | {"phase": phase, "metric": metric, "unit": unit} | extra | spread(values))
