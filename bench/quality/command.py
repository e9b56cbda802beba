"""The command, and what a comparison of the same kind shares with it: its plan is printed, then carried out."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bench.quality.artefacts import overhead
from bench.quality.cells import Cell, derivatives, grid
from bench.quality.jobs import (
    ABLATIONS,
    DONORS,
    ROUNDS,
    TRANSFERRED,
    Central,
    Deploy,
    Derive,
    Job,
    Place,
    check_provider,
)
from bench.quality.picture import draw
from bench.quality.pretrain import add_pretrain_arguments, pretrain
from bench.quality.verdict import report
from bench.quality.work import print_plan, work
from bench.rows import append, machine, newest, read, spread
from bench.shapes import shapes
from zo_finetuner.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, "quality")
    parser.add_argument("--ablations", action="store_true",
                        help="also: several learning sets, one scale per layer, no normalisation")  # fmt: skip
    parser.add_argument("--transfer", action="store_true", help="instead: what was learned for a base on a derivative "
                        "of it, and what was learned for another model of the family")  # fmt: skip
    add_pretrain_arguments(parser)


def add_run_arguments(parser: argparse.ArgumentParser, case: str) -> None:
    shared = Path(os.environ.get("ZO_DATA", "../shared"))
    add = parser.add_argument
    add("--shared", type=Path, default=shared, help="development data (models, rows, texts, published nets)")
    add("--work", type=Path, default=Path("runs") / case, help="finished runs, which are not repeated")
    add("--model", action="append", default=[], help="folder of a model; default: the small ones of --shared")
    add("--task", action="append", default=[], help="only these deployments (sst2, copa, squad-text, ...)")
    add("--provider", action="append", default=[], help="only these methods; any optimizer of the library")
    add("--steps", type=int, help="steps of two forwards per run, instead of each cell's own; of --pretrain")
    add("--workers", type=int, help="processes (default: 2, on a GPU 1)")
    add("--budget", type=float, metavar="MINUTES", help="no job is begun after these")
    add("--plan", action="store_true", help="print the plan and end")


def run(arguments: argparse.Namespace) -> int:
    if arguments.pretrain:
        return in_one_line("quality", arguments, lambda device: pretrain(arguments))

    def jobs() -> list[Job]:
        cells = grid(arguments.shared, arguments.model, arguments.task, arguments.quick, arguments.steps)
        if arguments.transfer:
            return transfers(cells, arguments.work)
        return plan(cells, arguments.provider, arguments.ablations)

    def finish(place: Place) -> None:
        _overhead(place)
        rows = newest(read(place.rows))
        print(report(rows))
        draw(rows, place.out / "quality.png")

    return measure(arguments, Place(arguments.shared, arguments.work, arguments.out, arguments.quick), jobs, finish)


def measure(
    arguments: argparse.Namespace, place: Place, jobs: Callable[[], list[Job]], finish: Callable[[Place], None]
) -> int:
    """Print the plan of the jobs, do what is left of them, then what is made of the rows; the exit status."""
    started = time.monotonic()

    def carry_out(device: str) -> int:
        todo, here = jobs(), replace(place, device=device)
        workers = arguments.workers or (1 if device == "cuda" else 2)
        print_plan(todo, here, workers)
        if arguments.plan:
            return 0
        failed = work(todo, here, workers, None if arguments.budget is None else started + 60 * arguments.budget)
        finish(here)
        return int(failed > 0)

    return in_one_line(place.case, arguments, carry_out)


def in_one_line(case: str, arguments: argparse.Namespace, act: Callable[[str], int]) -> int:
    """What `act` returns for the device that was asked for; 1 after a line that says what is wrong."""
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also for the processes of the jobs
    elif arguments.device == "cuda" and not torch.cuda.is_available():
        print(f"{case}: torch sees no CUDA device; --device cpu measures this machine")
        return 1
    try:
        return act(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except InputError as error:
        print(f"{case}: {error}")
        return 1


def plan(cells: list[Cell], providers: list[str], ablations: bool) -> list[Job]:
    """All jobs in the order in which they are begun, what is learned before what needs it.  Raises InputError."""
    for name in providers:
        check_provider(name)
    models = list(dict.fromkeys(cell.model for cell in cells))
    turns = [[cell for cell in cells if cell.model == model] for model in models]
    ordered = [cells[i] for i in range(max(map(len, turns))) for cells in turns if i < len(cells)]
    asked = [("adam", *providers)] if providers else ROUNDS
    deploys = [Deploy(cell, name) for names in asked for cell in ordered for name in names]
    if ablations:
        deploys += [Deploy(cell, name) for turn in turns for cell in turn[:2] for name in ABLATIONS]
    return _ordered(deploys)


def transfers(cells: list[Cell], work: Path) -> list[Job]:
    """Derivatives of the cells' models, and each model's first cell with what another one has learned."""
    derived = derivatives(cells, work)
    first = {cell.model: cell for cell in reversed(cells) if Path(cell.model).name in DONORS}.values()
    deploys = [Deploy(cell, name) for cell in derived for name in ("adam", "mezo", "closed-form", "improved")]
    deploys += [Deploy(cell, name) for cell in first for name in ("adam", "mezo", "improved", TRANSFERRED)]
    return [*(Derive(cell.base, cell.model) for cell in derived), *_ordered(deploys)]


def _ordered(deploys: list[Deploy]) -> list[Job]:
    """With what they need before them."""
    jobs: list[Job] = [Central(model) for model in dict.fromkeys(deploy.cell.learned_for for deploy in deploys)]
    for deploy in dict.fromkeys(deploys):
        if deploy.learns is not None and deploy.learns not in jobs:
            jobs.append(deploy.learns)
        jobs.append(deploy)
    return jobs


def _overhead(place: Place) -> None:
    """Bytes of the scales' policies for OPT-30B's 772 blocks; once."""
    named, path = shapes("opt-30b"), place.rows
    known = {(row["provider"], row["p50"]) for row in read(path) if row["metric"] == "overhead_bytes"}
    for provider, size in overhead([name for name, _ in named], [math.prod(shape) for _, shape in named]).items():
        if (provider, size) in known:
            continue
        row = {"case": "quality", "provider": provider, "dtype": "float32", "n": len(named), "model": "opt-30b",
               "metric": "overhead_bytes", "unit": "bytes", **spread([size]), **machine("cpu")}  # fmt: skip
        append(path, row)
