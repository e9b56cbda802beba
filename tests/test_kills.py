"""`zo train` is killed (SIGKILL) at any moment and resumed: it ends at the weights of the run that nobody disturbed.

Half of the kills come at random times, half at places that are hard to meet by chance: in a probe, in an update, in the
middle of a journal's record or of its header, while a checkpoint, a model or a result is written.  A run is killed up
to three times.  After each kill the journal holds every step that had ended, and none of them is taken again.

`make test` kills 5 times; `make test-long` (ZO_LONG=1) 50, and adds a row to bench/results/kills.jsonl.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forks import start, wait
from models import save_model, save_rows
from safetensors.torch import load_file
from test_cli import flags

from bench.rows import ROOT, append, machine, spread
from zo_finetuner import files, training
from zo_finetuner.engine import Engine
from zo_finetuner.journal import read_journal
from zo_finetuner.journal_writer import JournalWriter
from zo_finetuner.positions import _has_header

LONG = bool(os.environ.get("ZO_LONG"))
KILLS = 50 if LONG else 5
STEPS = 12

# Settings; a model in bf16 is probed in a scratch, one in fp32 in place.
CASES = {
    "mezo": dict(lr_scheduler="linear"),
    "mezo bf16, checkpoints": dict(model="bf16", weight_decay=0.1, journal=False),
    "zo-finetuner bf16": dict(model="bf16", optimizer="zo-finetuner", lr_scheduler="cosine"),
    "lozo": dict(optimizer="lozo", set="period=5"),
    "zo-adam, checkpoints": dict(optimizer="zo-adam", lr=1e-3, journal=False),
    "self-calibrated": dict(optimizer="self-calibrated", weight_decay=0.1),
    "mezo-gv bf16": dict(model="bf16", optimizer="mezo-gv"),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(original, *args, **kwargs):
    die()


def after(original, *args, **kwargs):
    original(*args, **kwargs)
    die()


def halfway(original, writer, content):
    os.write(writer._file, content[: len(content) // 2])
    die()


# A place -> (owner, name, how often it is passed in a run, when to die).
PLACES = {
    "probe": (Engine, "_evaluate", 2 * STEPS, before),
    "update": (Engine, "_apply", STEPS, after),
    "in a record": (JournalWriter, "_write", STEPS + 1, halfway),
    "after a record": (JournalWriter, "append", STEPS, after),
    "evaluation": (training.TaskTrainer, "evaluate", 3, before),
    "saving": (files, "_sync", 24, before),
    "result": (training, "write_json", 2, before),
    "report": (training, "write_report", 1, before),
}


@dataclasses.dataclass
class Kill:
    """At the number-th passage of a place; place "": after so many seconds."""

    place: str
    number: int = 1
    seconds: float = 0.0

    def prepare(self) -> None:
        if not self.place:
            return
        owner, name, _, how = PLACES[self.place]
        original, calls = getattr(owner, name), itertools.count(1)

        def counted(*args, **kwargs):
            if next(calls) == self.number:
                return how(original, *args, **kwargs)
            return original(*args, **kwargs)

        setattr(owner, name, counted)


def kills(rng: random.Random, duration: float):
    """A random time and a place in turn, for ever."""
    places = rng.sample(list(PLACES), len(PLACES))
    for place in itertools.cycle(places):
        yield Kill(place, rng.randint(1, PLACES[place][2]))
        yield Kill("", seconds=rng.uniform(0, duration))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_model(folder / "model")
    save_model(folder / "bf16", torch.bfloat16)
    save_rows(folder / "data")
    return folder


class Runs:
    """Runs of one case: the undisturbed one, and others beside it."""

    def __init__(self, base: Path, folder: Path, case: str):
        self.folder, self.case, self.numbers = folder, case, itertools.count()
        settings = dict(steps=STEPS, eval_steps=4, num_train=20, lr=1e-2) | CASES[case]
        self.journal = settings.pop("journal", True)
        settings["model"] = base / settings.get("model", "model")
        more = [] if self.journal else ["--no-journal"]
        self.argv = lambda out: [*flags(base, out, **settings), "--resume", *more]
        self.live = mmap.mmap(-1, 16)  # shared with the child: the steps that it has taken itself, [first, end)
        began = time.monotonic()
        assert wait(self.start(folder / "whole")) == 0
        self.duration = time.monotonic() - began
        self.end = self.result(folder / "whole")

    def start(self, out: Path, kill: Kill | None = None):
        def patches():
            end = Engine.end

            def counted(engine):
                step, live = engine.step_count, engine.journal is not None or not self.journal
                end(engine)
                if live:
                    first = int.from_bytes(self.live[:8], "little") or step + 1
                    self.live[:] = first.to_bytes(8, "little") + (step + 1).to_bytes(8, "little")

            Engine.end, training.write_report = counted, lambda *_: None  # a picture takes half of a tiny run
            if kill is not None:
                kill.prepare()

        self.live[:] = bytes(16)
        return start(self.argv(out), self.folder / f"log-{next(self.numbers)}", patches)

    def killed(self, out: Path, kill: Kill) -> bool:
        """Whether it was killed before it ended."""
        child = self.start(out, kill)
        if kill.place:
            code = wait(child)
        else:
            time.sleep(kill.seconds)
            code = child.ended()
            if code is None:
                child.kill()
                code = wait(child)
        assert code in (0, -signal.SIGKILL), f"{self.case}, {kill}:\n{child.text[-3000:]}"
        return code != 0

    def result(self, out: Path):
        """What a run must share with the undisturbed one: weights, and numbers."""
        result = json.loads((out / "result.json").read_text())
        keys = ("steps", "eval_loss_before", "eval_loss_after", "best_step", "best_dev_loss", "skipped_steps")
        return load_file(out / "model" / "model.safetensors"), {key: result[key] for key in keys}

    def require_kept(self, out: Path, before: int) -> int:
        """The journal has every step that had ended, and the run began with the first that it had not (before)."""
        first, ended = (int.from_bytes(self.live[at : at + 8], "little") for at in (0, 8))
        path = out / "journal.zoj"
        steps = read_journal(path).steps if _has_header(path) else 0
        assert steps >= max(ended, before), f"{self.case}: step {ended} had ended, the journal has {steps}"
        assert not first or first == before + 1, f"{self.case}: the journal had {before} steps, {first} was taken again"
        return steps


def test_every_kill_is_recovered_from(base, tmp_path):
    rng = random.Random(7)
    began, count, number = time.monotonic(), 0, 0
    runs: dict[str, Runs] = {}
    upcoming = {}
    for case in itertools.cycle(CASES):
        if count == KILLS:
            break
        if case not in runs:
            (tmp_path / case).mkdir()
            runs[case] = Runs(base, tmp_path / case, case)
            upcoming[case] = kills(rng, runs[case].duration)
        number += 1
        run, out, kept = runs[case], tmp_path / case / f"run-{number}", 0
        for _ in range(min(rng.randint(1, 3), KILLS - count)):
            if not run.killed(out, next(upcoming[case])):
                break
            count += 1
            kept = run.require_kept(out, kept) if run.journal else 0
        if not (out / "result.json").exists():
            child = run.start(out)
            assert wait(child) == 0, child.text[-3000:]
        (weights, facts), (whole, expected) = run.result(out), run.end
        assert facts == expected, case
        assert all(torch.equal(weights[name], whole[name]) for name in whole), case
        assert not [path for path in out.iterdir() if path.name.endswith((".unfinished", ".old", ".tmp"))], case
    if LONG:
        append(ROOT / "bench" / "results" / "kills.jsonl", {
            **machine("cpu"), "case": "kill and resume", "provider": "zo train", "dtype": "fp32 and bf16", "n": KILLS,
            "metric": "recovered bit-equal", "unit": "kills", **spread([float(count)]), "runs": number,
            "seconds": time.monotonic() - began, "cases": list(runs), "places": [*PLACES, "random times"],
        })  # fmt: skip


@pytest.mark.skipif(not LONG, reason="starts an interpreter three times (ZO_LONG)")
def test_a_process_of_its_own(base, tmp_path):
    """The same without a fork: `python -m zo_finetuner.cli train`, killed once its journal has a few steps."""
    argv = [sys.executable, "-m", "zo_finetuner.cli", *flags(base, tmp_path / "part", steps=200, eval_steps=50)]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log)
        while not (_has_header(tmp_path / "part" / "journal.zoj") and
                   read_journal(tmp_path / "part" / "journal.zoj").steps > 3):  # fmt: skip
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "part" / "result.json").exists()
        subprocess.run([*argv, "--resume"], stdout=log, stderr=log, check=True)
        whole = [*argv[:3], *flags(base, tmp_path / "whole", steps=200, eval_steps=50)]
        subprocess.run(whole, stdout=log, stderr=log, check=True)
    ends = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("part", "whole")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
