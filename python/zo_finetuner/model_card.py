"""The README.md of a fine-tuned model: what was done to which base, in numbers from which it can be done again.

    results       held-out numbers, before and after where both are known
    method        its settings, rates, schedule, steps and forwards
    noise         the contract that the perturbations follow, and the seed
    journal       the file of all steps: its name, how many it holds, its SHA-256
    versions      of what computed it

The front matter is the Hub's (base model, library, tags, results as a model index).
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from zo_finetuner.adapters import adapter_kind
from zo_finetuner.engine import Engine
from zo_finetuner.files import write_text
from zo_finetuner.journal import read_journal
from zo_finetuner.optim.settings import settings_of
from zo_finetuner.quantised import quantised_tensor
from zo_finetuner.rows import unwrap
from zo_kernels import NOISE_VERSION

TAGS = ("zo-finetuner", "zeroth-order", "forward-only")
PACKAGES = ("zo-finetuner", "torch", "transformers", "peft", "trl", "torchao", "bitsandbytes")


@dataclass(frozen=True)
class Result:
    """A number on held-out rows; before: of the base, None where it was not measured."""

    name: str
    after: float
    before: float | None = None
    rows: int | None = None


@dataclass(frozen=True)
class CardFacts:
    """What a card tells besides what the engine knows.  run: rates, schedule and batch (`hf.schedule_of`).  data: what
    it was trained on, in a word (a task, a data set's name).  journal: the file of this run, if it kept one."""

    name: str
    run: Mapping[str, Any]
    results: Iterable[Result] = ()
    data: str = ""
    journal: Path | None = None
    hub: Mapping[str, Any] = field(default_factory=dict)  # language, license, tags: as in Trainer.create_model_card


def write_card(folder: Path, engine: Engine, facts: CardFacts) -> None:
    """README.md in the folder of the model's files; replaces what PEFT or another trainer wrote."""
    write_text(folder / "README.md", model_card(engine, facts))


def model_card(engine: Engine, facts: CardFacts) -> str:
    model = engine.model
    base = base_model(model)
    data = f" on {_code(facts.data)}" if facts.data else ""
    sections = [
        _front_matter(model, engine, facts, base),
        f"# {_plain(facts.name)}",
        f"{_code(base) if base else 'A model'} fine-tuned{data} with forward passes only: a zeroth-order method took "
        f"{engine.method.forwards} evaluations of the loss a step, and no gradient was computed.",
        "## Results\n\n" + (_results(list(facts.results)) or "No held-out rows were evaluated."),
        "## How it was trained\n\n" + _table(("setting", "value"), _method(engine, facts.run)),
        "## Noise contract\n\n"
        f"Version {NOISE_VERSION}: every perturbation is a function of (seed, name of the tensor, element), by the "
        "counter-based generator Philox4x32-10, and so can be made again on any device. The seed of probe k of step t "
        f"follows from the run's seed, {engine.seed}.",
        "## Journal\n\n" + _journal(facts.journal),
        "## Versions\n\n" + ", ".join(f"{name} {number}" for name, number in _versions()) + ".",
    ]
    return "\n\n".join(sections) + "\n"


def base_model(model: nn.Module) -> str:
    """Name of the base as it was given to `from_pretrained`; empty where there is none."""
    return str(getattr(getattr(unwrap(model), "config", None), "_name_or_path", "") or "")


def _front_matter(model: nn.Module, engine: Engine, facts: CardFacts, base: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    given = {name: value for name, value in facts.hub.items() if value is not None}
    tags = given.pop("tags", None) or []
    tags = [*TAGS, engine.method.name, *([tags] if isinstance(tags, str) else tags)]
    results = [
        EvalResult(
            task_type="text-generation", dataset_type=facts.data, dataset_name=facts.data, dataset_split="held-out",
            metric_type=result.name, metric_value=float(result.after),
        )
        for result in facts.results
        if facts.data
    ]  # fmt: skip
    index = {"model_name": _plain(facts.name), "eval_results": results} if results else {}
    card = ModelCardData(
        library_name="peft" if hasattr(model, "peft_config") else "transformers",
        base_model=base if base and not Path(base).exists() else None,  # a folder of this machine is nobody else's
        tags=list(dict.fromkeys(tags)), **given, **index,
    )  # fmt: skip
    return f"---\n{card.to_yaml()}\n---"


def _results(results: list[Result]) -> str:
    if not results:
        return ""
    rows = [(r.name, _number(r.before), _number(r.after), r.rows or "") for r in results]
    return _table(("held out", "before", "after", "rows"), rows)


def _method(engine: Engine, run: Mapping[str, Any]) -> list[tuple[str, Any]]:
    method, trained = engine.method, engine.blocks.tensors
    owners = [method, *getattr(method, "parts", {}).values()]
    settings = {name: getattr(owner, name) for owner in owners for name in settings_of(type(owner))}
    shown = " ".join(f"{name}={value}" for name, value in settings.items() if value != "")
    quantised, adapter = quantised_tensor(engine.model), adapter_kind(engine.model)
    size = f"{len(trained)} tensors, {sum(t.numel() for t in trained):,} parameters"
    rows = [
        ("method", _code(method.name) + (f" ({shown})" if shown else "")),
        ("trained", f"{adapter} adapter: {size}" if adapter else size),
        ("base", f"quantised ({quantised[1]})" if quantised else str(next(engine.model.parameters()).dtype)[6:]),
        ("steps", f"{engine.step_count}, {engine.step_count * method.forwards} forwards"),
        ("skipped steps", int(engine.skipped)),
        ("eps", f"{float(engine.eps):g}"),
        ("probing", engine.probing.mode),
    ]
    return rows + [(name.replace("_", " "), value) for name, value in run.items() if value is not None]


def _journal(path: Path | None) -> str:
    if path is None or not path.is_file():
        return "None was kept."
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    steps = read_journal(path).steps
    return (f"{_code(path.name)} holds {steps} steps: seeds, losses and coefficients, of which `zo replay BASE "
            f"{_plain(path.name)} --out DIR` makes the weights of any step. SHA-256 {_code(digest)}.")


def _versions() -> list[tuple[str, str]]:
    found = [("python", platform.python_version())]
    for package in PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            pass
    return found


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(_plain(str(cell)) for cell in line) + " |" for line in lines)


def _plain(text: str) -> str:
    """On one line, and no end of a cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{_plain(text).replace('`', '')}`"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
