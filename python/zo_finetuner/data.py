"""Rows of a task, read from a folder or the Hub, every one of them checked, and sampled as MeZO samples them.

Nothing here tokenises or touches a model: a fault in row 1,499 is told before anything else has run.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zo_finetuner.errors import InputError, nearest
from zo_finetuner.reading import decode, parse_json, read_lines, shown
from zo_finetuner.tasks import Task

# Where a training split is too small for both, dev takes at most this share (CB's 100 of 250 are .40).
DEV_SHARE = 0.4


@dataclass(frozen=True)
class Splits:
    """Sampled rows. origin says where each split came from ("train" -> file, or Hub dataset and split) and
    index holds each row's number there (from 0; blank lines of a file do not count)."""

    train: list[dict[str, Any]]
    dev: list[dict[str, Any]]
    test: list[dict[str, Any]]
    origin: dict[str, str]
    index: dict[str, list[int]]


def load_splits(
    task: Task,
    source: str | Path | None = None,
    *,
    seed: int = 0,
    num_train: int | None = None,
    num_dev: int | None = None,
    num_eval: int | None = None,
) -> Splits:
    """Load, check and sample a task's rows (MeZO's protocol, Malladi et al. 2023).

    source is a folder with train.jsonl and validation.jsonl (Hugging Face field names), a Hub dataset
    ("nyu-mll/glue", or with its configuration "nyu-mll/glue:sst2"), or None for the task's own Hub dataset.
    The training split is permuted under RandomState(seed); of its first num_train + num_dev rows the last
    num_dev are dev. test is the first num_eval of a permutation of the validation split under the same seed.
    Sizes default to the task's. Where the training split is too small, dev keeps its size up to 2/5 of the
    rows, train takes the rest, and a warning says so.

    Raises InputError for a missing file or dataset, an empty split, and the first row at fault.
    """
    num_train = _size("num_train", num_train, task.train, least=1)
    num_dev = _size("num_dev", num_dev, task.dev)
    num_eval = _size("num_eval", num_eval, task.eval)
    if not 0 <= seed < 2**32:
        raise InputError(f"data seed {seed} is out of range; use 0 to {2**32 - 1}")

    rows, origin = {}, {}
    for split in ("train", "validation"):
        origin[split], located = _open(task, source, split)
        rows[split] = []
        for place, row in located:
            check_row(task, row, place)
            rows[split].append(row)
        if not rows[split]:
            raise InputError(f'{origin[split]}: no rows; task "{task.name}" needs at least one')

    available = len(rows["train"])
    train, dev = _fit(available, num_train, num_dev)
    if (train, dev) != (num_train, num_dev):
        warnings.warn(
            f"{origin['train']}: {available} rows are fewer than {num_train} train + {num_dev} dev; "
            f"using {train} train + {dev} dev",
            stacklevel=2,
        )
    order = permutation(available, seed)[: train + dev]
    test_order = permutation(len(rows["validation"]), seed)[:num_eval]
    return Splits(
        train=[rows["train"][i] for i in order[:train]],
        dev=[rows["train"][i] for i in order[train:]],
        test=[rows["validation"][i] for i in test_order],
        origin={"train": origin["train"], "dev": origin["train"], "test": origin["validation"]},
        index={"train": order[:train], "dev": order[train:], "test": test_order},
    )


def check_row(task: Task, row: Any, place: str) -> None:
    """Raise InputError unless the row has every field of the task with a value of its kind; place is
    "file:line"."""
    if not isinstance(row, dict):
        raise InputError(f"{place}: a row must be a JSON object, not {_show(row)}")
    for name, kind in task.fields.items():
        if name not in row:
            raise InputError(
                f'{place}: field "{name}" is missing{nearest(name, row)}; '
                f'task "{task.name}" needs {", ".join(task.fields)}'
            )
        if fault := _fault(name, row[name], kind):
            raise InputError(f"{place}: {fault}")
    if fault := task.fault(row):
        raise InputError(f"{place}: {fault}")


def _fault(name: str, value: Any, kind: Any) -> str | None:
    """What is wrong with a field's value and how to mend it, or None; `kind` as in `Task.fields`."""
    if isinstance(kind, tuple):
        meaning = ", ".join(f"{i} ({word})" for i, word in enumerate(kind))
        if value is None or (type(value) is int and value == -1):
            return f'field "{name}" is {_show(value)}: no label; write {meaning}, or leave the row out'
        good, wanted = type(value) is int and 0 <= value < len(kind), meaning
    elif isinstance(kind, frozenset):
        good = isinstance(value, str) and value in kind
        wanted = " or ".join(f'"{word}"' for word in sorted(kind))
    elif isinstance(kind, dict):
        if isinstance(value, dict):
            for inner, inner_kind in kind.items():
                if inner not in value:
                    return f'field "{name}.{inner}" is missing; "{name}" must be an object that holds it'
                if fault := _fault(f"{name}.{inner}", value[inner], inner_kind):
                    return fault
        good, wanted = isinstance(value, dict), "an object with " + ", ".join(f'"{inner}"' for inner in kind)
    elif isinstance(kind, list):
        good = isinstance(value, list) and value and all(isinstance(v, str) and v.strip() for v in value)
        wanted = "a list of one or more non-blank texts"
    else:
        good, wanted = isinstance(value, str), "a text"
    return None if good else f'field "{name}" is {_show(value)}; it must be {wanted}'


def _show(value: Any) -> str:
    return shown(json.dumps(value, ensure_ascii=False, default=repr), 57)


def _open(task: Task, source: str | Path | None, split: str) -> tuple[str, Iterator[tuple[str, Any]]]:
    """Where the split comes from, and its rows, each with the place an error names."""
    if source is not None:
        folder = Path(source).expanduser()
        if folder.is_dir():
            path = folder / f"{split}.jsonl"
            return str(path), _read_lines(path)
        if folder.exists():
            raise InputError(f"{source}: not a folder; give the one with train.jsonl and validation.jsonl")
        if isinstance(source, Path) or source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise InputError(f"{source}: no such folder; it should hold train.jsonl and validation.jsonl")
    return _read_hub(task, source, split)


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    # Plain json instead of the `datasets` reader: that one names neither line nor byte, and casts types
    # silently.
    if not path.exists():
        found = ", ".join(sorted(p.name for p in path.parent.iterdir())) or "nothing"
        raise InputError(f"{path}: no such file; the folder holds {shown(found, 200)}")
    for place, line in read_lines(path):
        yield place, parse_json(decode(line, place), place, "write one object a line")


def _read_hub(task: Task, source: str | None, split: str) -> tuple[str, Iterator[tuple[str, Any]]]:
    name, config = task.hub
    if source is not None:
        given, _, given_config = source.partition(":")
        config = given_config or (config if given == name else None)
        name = given
    origin = f"{name}{f' ({config})' if config else ''}, split {split}"
    mend = "or give a folder with train.jsonl and validation.jsonl"
    try:
        import datasets
    except ImportError:
        raise InputError(f"{origin}: reading the Hub needs `pip install datasets`; {mend}") from None
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # a dozen unrelated types come from here; the first line says what happened
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{origin}: no such folder, and the Hub gave: {reason}; {mend}") from error
    return origin, ((f"{origin}, row {i} (from 0)", dict(row)) for i, row in enumerate(rows))


def _fit(available: int, num_train: int, num_dev: int) -> tuple[int, int]:
    dev = min(num_dev, max(available - num_train, int(DEV_SHARE * available)))
    return min(num_train, available - dev), dev


def permutation(count: int, seed: int) -> list[int]:
    return np.random.RandomState(seed).permutation(count).tolist()


def _size(name: str, given: int | None, default: int, least: int = 0) -> int:
    if given is None:
        return default
    if given < least:
        raise InputError(f"{name} is {given}; it must be at least {least}")
    return given
