"""Cells of the comparison: a base model, a deployment, and the learning set its scales come from.

A deployment is a task of the MeZO protocol or a language model's adaptation to another text.  No cell deploys on what
its scales were learned on: `squad-text` serves everything but the texts of its own kind, which `sst2` serves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from zo_finetuner.data import load_splits
from zo_finetuner.encoding import Encoded, context_length, encode_rows
from zo_finetuner.errors import InputError
from zo_finetuner.files import make_folder, write_text
from zo_finetuner.learning.text import text_windows
from zo_finetuner.tasks import Task, get_task
from zo_finetuner.workload import prior_loss

BATCH, TEXT_BATCH, EPS, WINDOW = 16, 8, 1e-3, 49
HORIZON = 400  # steps that the improved recipe learns for
TRAIN, DEV, TEST = 1000, 256, 256  # rows of a task
TEXT_ROWS = (800, 128, 128)  # windows of a text
FILMS = 4000  # reviews of the corpus that are used: 5 MB
LEARN_ON = {"squad-text": "sst2", "drop-text": "sst2"}  # all others: squad-text
DERIVED_ON = "film-text"  # what a derivative of a base has been trained on
SEVERAL = ("squad-text", "sst2", "copa")  # the ablation's sets, without the cell's own

#: Steps per deployment: the default grid takes about an hour on two cores of one's own.  Most telling cells first.
GRID = {
    "stories260k-llama": {"film-text": 300, "copa": 150, "sst2": 200, "squad-text": 300, "drop-text": 300, "wic": 150},
    "imdb-llama-6m": {"sst2": 100, "copa": 100, "squad-text": 400},
}
OTHER = {"squad-text": 400, "sst2": 400, "copa": 400, "drop-text": 400, "wic": 400}
QUICK = {"stories260k-llama": {"film-text": 100, "squad-text": 100}}
QUICK_OTHER = {"squad-text": 100, "sst2": 100}


@dataclass(frozen=True)
class Cell:
    """model: folder.  task: a task's name, or film-text, squad-text, drop-text.  steps: of two forwards each.
    base: folder of the model that scales are learned for, where `model` is a derivative of it that they never saw."""

    model: str
    task: str
    steps: int
    base: str = ""

    @property
    def name(self) -> str:
        return f"{Path(self.model).name}-{self.task}"

    @property
    def learned_for(self) -> str:
        return self.base or self.model

    @property
    def is_text(self) -> bool:
        return self.task.endswith("-text")

    @property
    def batch(self) -> int:
        return TEXT_BATCH if self.is_text else BATCH

    def steps_of(self, forwards: int) -> int:
        """Steps of so many forwards that the cell's own pay for.  Raises InputError where there is none."""
        if forwards > 2 * self.steps:
            raise InputError(f"{self.name}: a step takes {forwards} forwards, the run has {2 * self.steps}")
        return 2 * self.steps // forwards

    @property
    def learn_on(self) -> str:
        return LEARN_ON.get(self.task, "squad-text")

    @property
    def learn_on_several(self) -> tuple[str, ...]:
        return tuple(name for name in SEVERAL if name != self.task)


@dataclass(frozen=True)
class Rows:
    """Rows to train on, to choose rates by, and to report on; prior: loss of always answering the training prior on
    the last, None where there is no such thing.  task: None for text."""

    train: list[Encoded]
    dev: list[Encoded]
    test: list[Encoded]
    task: Task | None
    prior: float | None


def grid(shared: Path, models: list[str], tasks: list[str], quick: bool, steps: int | None = None) -> list[Cell]:
    """models: folders; none: those of the default grid.  tasks: only these.  Raises InputError."""
    usual, other = (QUICK, QUICK_OTHER) if quick else (GRID, OTHER)
    cells = []
    for model in models or [str(shared / "models" / name) for name in usual]:
        known = usual.get(Path(model).name, other)
        chosen = {task: known.get(task, max(known.values())) for task in tasks} if tasks else known
        cells += [Cell(model, task, steps or count) for task, count in chosen.items()]
    for cell in cells:
        if not cell.is_text:
            get_task(cell.task)
        elif cell.task not in _SOURCES:
            raise InputError(f"there is no text {cell.task}; there are: {', '.join(_SOURCES)}")
    return cells


def derivatives(bases: list[Cell], work: Path) -> list[Cell]:
    """One cell per base model: its continuation on film reviews (`artefacts.derive`), put on the base's longest other
    cell."""
    found = {}
    for cell in sorted(bases, key=lambda cell: cell.steps):
        if cell.task != DERIVED_ON:
            model = work / "derived" / f"{Path(cell.model).name}-films"
            found[cell.model] = Cell(str(model), cell.task, cell.steps, base=cell.model)
    return list(found.values())


def load_rows(cell: Cell, shared: Path, work: Path, model, tokenizer) -> Rows:
    """The same rows for every method and seed."""
    if cell.is_text:
        source = text_file(cell.task, shared, work)
        limit = min(WINDOW, context_length(model))
        train, dev, test = text_windows(source, tokenizer, limit, seed=1, counts=TEXT_ROWS)
        return Rows(train, dev, test, None, None)
    task = get_task(cell.task)
    rows = load_splits(task, shared / "data" / task.name, num_train=TRAIN, num_dev=DEV, num_eval=TEST)
    limit = context_length(model)
    train, dev, test = (encode_rows(task, split, tokenizer, limit) for split in (rows.train, rows.dev, rows.test))
    return Rows(train, dev, test, task, prior_loss(task, rows.train, rows.test))


def text_file(name: str, shared: Path, work: Path) -> Path:
    """A text of one document a line, made once from the rows or the corpus of `shared`."""
    path = work / "texts" / f"{name}.txt"
    if not path.is_file():
        make_folder(path.parent)
        write_text(path, "\n".join(" ".join(document.split()) for document in _SOURCES[name](shared)) + "\n")
    return path


def _films(shared: Path) -> Iterator[str]:
    import lzma

    with lzma.open(shared / "corpus" / "imdb_unsup_50k.txt.xz", "rt", encoding="utf-8") as lines:
        yield from islice(lines, FILMS)


def _column(shared: Path, task: str, field: str) -> list[str]:
    """Distinct passages, in order."""
    lines = []
    for split in ("train", "validation"):
        lines += (shared / "data" / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys(json.loads(line)[field] for line in lines))


_SOURCES = {
    "film-text": _films,
    "squad-text": lambda shared: _column(shared, "squad", "context"),
    "drop-text": lambda shared: _column(shared, "drop", "passage"),
}
