"""A run's place in its journal, in the stead of checkpoints: no weights are written before the end.

    step N     base model, then the journal's steps rerun on its losses: weights, method and guard are as they were;
               schedule and order of the rows are functions of N (and of the seed)
    log        OUT/log.jsonl: what was evaluated so far, and so the best step; an evaluation that was due at N and is
               not there is made up for
    best       at the end: the base model again, then the journal replayed to the best step

`why_not` says which runs keep checkpoints of weights instead.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerState

from zo_finetuner.config import RunConfig
from zo_finetuner.engine import Engine
from zo_finetuner.errors import InputError
from zo_finetuner.journal import PREFIX, Journal, read_journal
from zo_finetuner.loading import load_model
from zo_finetuner.ranks import joined
from zo_finetuner.reading import decode, open_file, parse_json, read_lines
from zo_finetuner.replay import branch_off, differences, matching_blocks, replay, rerun

logger = logging.getLogger(__name__)

Entry = dict[str, Any]  # of the Trainer's log


def why_not(config: RunConfig, model: nn.Module) -> str:
    """Why a run cannot be taken up from its journal, and keeps checkpoints of weights; empty where it can."""
    if not config.journal:
        return "it has no journal"
    if hasattr(model, "peft_config"):
        return "an adapter's checkpoint is small, and its first weights are drawn"
    if joined():
        return "only the first of several processes writes it"
    if config.random_weights:
        return "its first weights are drawn on the device"
    if config.lr_scheduler in ("reduce_lr_on_plateau", "greedy"):
        return f"the schedule {config.lr_scheduler} depends on more than the step"
    return ""


class Position:
    """Where the run of a folder stands: `Position.of`; None where it has not begun."""

    def __init__(self, journal: Journal, step: int, history: list[Entry]):
        self.journal, self.step = journal, step
        self.history = [entry for entry in history if entry.get("step", 0) <= step]

    @classmethod
    def of(cls, journal: Path, log: Path, steps: int, every: int) -> Position | None:
        """steps: of the whole run; every: steps between evaluations.  After a power cut the log may lack evaluations
        that the journal is past of: then the first of them is where the run goes on."""
        if not _has_header(journal):
            return None
        read, history = read_journal(journal), read_log(log)
        step = min(read.steps, steps)
        last = max((entry["step"] for entry in history if "eval_loss" in entry and entry["step"] <= step), default=0)
        return cls(read, min(step, (last // every + 1) * every), history) if step else None

    def save_state(self, folder: Path, args: Any) -> None:
        """What the Trainer reads of a checkpoint."""
        epoch = self.history[-1].get("epoch", 0.0) if self.history else 0.0
        state = TrainerState(global_step=self.step, epoch=epoch, log_history=self.history,
                             train_batch_size=args.train_batch_size)  # fmt: skip
        state.compute_steps(args, args.max_steps)
        best = best_of(self.history)
        if best is not None:
            state.best_global_step, state.best_metric = best["step"], best["eval_loss"]
        state.save_to_json(str(folder / "trainer_state.json"))

    @property
    def evaluated(self) -> bool:
        return any("eval_loss" in entry and entry["step"] == self.step for entry in self.history)

    def take(self, optimizer: Any, scheduler: Any) -> None:
        """From the base model to this step.  Raises InputError for another base model."""
        engine = optimizer.engine
        matching_blocks(engine.model, self.journal)
        for difference in differences(self.journal.header, engine.device):
            logger.warning("not to the bit what the run would have been: %s", difference)
        rerun(engine, self.journal, self.step)
        engine.guard.load(engine.guard.state)
        engine.journal.goes_on(engine)
        if self.evaluated:  # an evaluation reads the weights whole
            engine.flush()
        if not isinstance(scheduler, LambdaLR):
            raise TypeError(f"{type(scheduler).__name__} is not a function of the step: mend positions.why_not")
        scheduler.last_epoch = self.step - 1
        with warnings.catch_warnings():  # torch has seen no step of the optimizer: `rerun` took them
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            scheduler.step()


class ResumesFromJournal:
    """A mixin over a ZOTrainerMixin: `position`, where there is one, stands for the checkpoint that it resumes from."""

    position: Position | None = None

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.position is None:
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.position is None:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            self.position.take(self.zo_optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.position is None:
            return super()._load_rng_state(checkpoint)
        accumulated = self.args.gradient_accumulation_steps
        steps = max(1, -(-len(self.get_train_dataloader()) // accumulated))
        for _ in range(self.position.step // steps):  # steps draw nothing, a loader one number at every epoch
            iter(DataLoader([None]))

    def resume(self, position: Position) -> None:
        """Train from a position to the end."""
        self.position = position
        self.add_callback(_MakesUp(self))
        with tempfile.TemporaryDirectory() as folder:
            position.save_state(Path(folder), self.args)
            self.train(resume_from_checkpoint=folder)


class _MakesUp(TrainerCallback):
    """Makes the evaluation that was due at the step where a run was cut off."""

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        due = state.global_step % args.eval_steps == 0 or state.global_step >= state.max_steps
        if due and not self._trainer.position.evaluated:
            self._trainer._determine_best_metric(self._trainer.evaluate(), None)


@torch.no_grad()
def take_best(config: RunConfig, engine: Engine, journal: Path, history: list[Entry]) -> None:
    """Bring a model from its last weights to those of the best evaluated step, by way of its first ones: they are read
    again on the host, so that no second model is on the device, nor a second state of the method: the engine, which
    takes no further step, gives its own up."""
    best, read, model = best_of(history), read_journal(journal), engine.model
    if best is None or best["step"] == read.steps:
        return
    engine.method.release()
    base, _ = load_model(config.model, config.dtype, device=torch.device("cpu"))
    for own, first in zip(model.state_dict().values(), base.state_dict().values(), strict=True):
        own.copy_(first)
    if config.branch:
        branch_off(model, config.branch)
    replay(model, read, best["step"])


def best_of(history: list[Entry]) -> Entry | None:
    """The evaluation of least loss, the first of equals; None before any."""
    evaluated = [entry for entry in history if entry.get("eval_loss", torch.nan) < torch.inf]
    return min(evaluated, key=lambda entry: entry["eval_loss"], default=None)


def read_log(path: Path) -> list[Entry]:
    """Entries of a log that may end in the middle of a line.  What stands behind a broken line is not believed."""
    if not path.exists():
        return []
    entries = []
    for place, line in read_lines(path):
        try:
            entry = parse_json(decode(line, place), place, "", finite=False)
        except InputError:
            break
        if isinstance(entry, dict) and type(entry.get("step")) is int and entry["step"] >= 0:
            losses = [entry[name] for name in ("loss", "eval_loss") if name in entry]
            if losses and all(type(loss) in (int, float) for loss in losses):
                entries.append(entry)
    return entries


def _has_header(path: Path) -> bool:
    """Whether a journal was begun: a run may have been killed while it wrote the header."""
    if not path.exists():
        return False
    with open_file(path) as stream:
        start = stream.read(PREFIX)
        return len(start) == PREFIX and stream.seek(0, 2) >= PREFIX + int.from_bytes(start[-4:], "little") + 4
