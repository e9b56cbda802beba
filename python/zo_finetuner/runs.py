"""Folders of `zo train`, read for reports: settings, log and result, and how several of them compare.

A run that goes on, or was cut off, has no result.json yet and is shown as far as it got.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zo_finetuner.config import RunConfig, typed
from zo_finetuner.errors import InputError
from zo_finetuner.reading import MOST_JSON, parse_json, read_object, read_text, shown
from zo_finetuner.yaml_file import read_yaml

#: Settings that say where and when and not what.
ASIDE = ("output_dir", "seed", "resume", "overwrite", "save_model", "checkpoints", "report_to")

WHOLE = "give a run whose files are whole"
#: Of result.json.
TEXTS = ("metric",)
NUMBERS = ("steps", "forwards", "seconds", "eval_loss_before", "eval_loss_after", "eval_metric_before",
           "eval_metric_after", "eval_rows", "best_step", "best_dev_loss", "skipped_steps")  # fmt: skip

#: Settings that name a run best.
TELLING = ("optimizer", "lr", "eps", "set", "pertnn", "batch_size", "model", "task", "data")


@dataclass(frozen=True)
class Run:
    """config: as resolved, settings that came later at their defaults.  history: the Trainer's log, an entry with a
    `step` each.  result: what result.json holds, empty where there is none yet."""

    name: str
    config: dict[str, Any]
    history: list[dict[str, Any]]
    result: dict[str, Any] = field(default_factory=dict)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of the entries that have a finite number there."""
        found = [(entry["step"], entry[key]) for entry in self.history if is_finite(entry.get(key))]
        return [step for step, _ in found], [value for _, value in found]

    def keys(self, start: str) -> list[str]:
        """Keys of numbers in the log that begin so, in the order in which they come."""
        return list(dict.fromkeys(k for entry in self.history for k in entry if k.startswith(start)))

    @property
    def steps(self) -> int:
        return max((entry["step"] for entry in self.history), default=0)

    @property
    def forwards_per_step(self) -> float | None:
        """None where neither log nor result says it."""
        steps, forwards = self.series("zo/forwards")
        if steps and steps[-1]:
            return forwards[-1] / steps[-1]
        if self.result.get("forwards") and self.result.get("steps"):
            return self.result["forwards"] / self.result["steps"]
        return None

    def middle(self, key: str) -> float | None:
        """The median of a series, None where it is empty."""
        values = sorted(self.series(key)[1])
        return values[len(values) // 2] if values else None


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone.  label: the settings in which it differs from other groups."""

    label: str
    runs: tuple[Run, ...]


def read_run(folder: Path) -> Run:
    """Raises InputError of one line for a folder that holds no run, and for a file of it that is broken."""
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder; give one that `zo train` wrote")
    if not (folder / "config.yaml").exists():
        raise InputError(f"{folder}: holds no run (there is no config.yaml); give a folder that `zo train` wrote")
    log, result = folder / "log.jsonl", folder / "result.json"
    return Run(
        str(folder),
        asdict(RunConfig()) | typed(read_yaml(folder / "config.yaml"), folder / "config.yaml"),
        read_log(log) if log.exists() else [],
        _checked(read_object(result, WHOLE, finite=False), result) if result.exists() else {},
    )


def _checked(result: dict[str, Any], path: Path) -> dict[str, Any]:
    for name in (*NUMBERS, *TEXTS):
        value = result.get(name)
        if value is not None and not (isinstance(value, str) if name in TEXTS else _is_number(value)):
            kind = "text" if name in TEXTS else "number"
            raise InputError(f'{path}: "{name}" is {shown(repr(value))}, no {kind}; {WHOLE}')
    if not isinstance(result.get("peak_bytes") or {}, dict):
        raise InputError(f'{path}: "peak_bytes" is {shown(repr(result["peak_bytes"]))}, no object; {WHOLE}')
    return result


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log.jsonl.  A last line without an end is being written, and left out.  Raises InputError naming
    the line."""
    lines = read_text(path, MOST_JSON).split("\n")[:-1]
    return [_entry(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def _entry(line: str, place: str) -> dict[str, Any]:
    entry = parse_json(line, place, "take the line away", finite=False)
    step = entry.get("step") if isinstance(entry, dict) else None
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 1 << 53:
        raise InputError(f'{place}: must be an object with a whole number as "step", got {shown(line)}')
    return entry


def is_finite(value: Any) -> bool:
    """Whether a number can be drawn: axes of twice 1e308 have no ends."""
    return _is_number(value) and abs(value) < 1e100


def _is_number(value: Any) -> bool:
    """NaN and infinity are among them."""
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return whole or isinstance(value, float)


def differing(runs: Sequence[Run]) -> list[str]:
    """Settings that are not the same in all runs, where they went aside."""
    names = dict.fromkeys(name for run in runs for name in run.config if name != "output_dir")
    return [name for name in names if len({repr(run.config.get(name)) for run in runs}) > 1]


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs of the same settings besides `ASIDE` together, in the order in which they come."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = sorted(run.config.items(), key=repr)  # a key of a YAML file may be a number
        groups.setdefault(repr([pair for pair in settings if pair[0] not in ASIDE]), []).append(run)
    found = list(groups.values())
    return [Group(label, tuple(members)) for label, members in zip(_labels(found), found, strict=True)]


def _labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """`es, lr 0.001`: as few settings as tell the groups apart, the most telling ones first; where that gets too long,
    and of a single run, the folder's name."""
    first = [group[0] for group in groups]
    if len(groups) == 1 and len(groups[0]) > 1:
        return [f"{brief(first[0].config.get('optimizer'))} ({len(groups[0])} seeds)"]
    varied = [name for name in differing(first) if name not in ASIDE]
    varied.sort(key=lambda name: TELLING.index(name) if name in TELLING else len(TELLING))
    named: list[str] = []
    texts = [""] * len(first)
    for name in varied:
        more = [_parts(run, [*named, name]) for run in first]
        if len(set(more)) > len(set(texts)):
            named, texts = [*named, name], more
    if not named or max(map(len, texts)) > 60:
        texts = [Path(run.name).name for run in first]
        texts = texts if len(set(texts)) == len(texts) else [run.name for run in first]
    counts = [f" ({len(group)} seeds)" if len(group) > 1 else "" for group in groups]
    return [text + count for text, count in zip(texts, counts, strict=True)]


def _parts(run: Run, names: Sequence[str]) -> str:
    values = [brief(run.config.get(name)) for name in names]
    return ", ".join(v if n == "optimizer" else f"{n} {v}" for n, v in zip(names, values, strict=True))


def brief(value: Any) -> str:
    """A setting in a few letters: numbers short, of a path its last part."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return " ".join(f"{name}={brief(inner)}" for name, inner in value.items()) or "-"
    if value is None:
        return "-"
    text = str(value)
    return text.rstrip("/").rsplit("/", 1)[-1] if text.count("/") > 1 else text
