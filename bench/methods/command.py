"""The command: all methods on learnable cells, their rates tuned on dev rows, three fresh seeds on held-out rows.

The budget is forwards: a method of k forwards a step makes F / k steps, a derivative by dual numbers counts as two.
Each method perturbs by its preset's eps.  Rates: the centre and a factor of 3 to both sides, then further, four at
most, while the best is at an end (`bench/quality/jobs.py` has the centre).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.methods.picture import draw
from bench.methods.table import table
from bench.quality.cells import Cell, grid
from bench.quality.command import add_run_arguments, measure, plan
from bench.quality.jobs import ON_SCALES, Job, Place
from bench.rows import newest, read
from zo_finetuner.optim import METHODS

MULTIPLES, MORE = (1 / 3, 1.0, 3.0), 4
#: With headroom and little noise, a minute or two per method.  (On SST-2 this model's seeds differ more than methods.)
CELLS = (("stories260k-llama", "film-text", 300), ("stories260k-llama", "copa", 150),
         ("stories260k-llama", "squad-text", 300), ("imdb-llama-6m", "sst2", 100))  # fmt: skip
NOT_RUN = ("sigma-one",)  # MeZO bit for bit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, "methods")


def run(arguments: argparse.Namespace) -> int:
    place = Place(arguments.shared, arguments.work, arguments.out, arguments.quick, case="methods",
                  multiples=MULTIPLES, more=MORE)  # fmt: skip
    return measure(arguments, place, lambda: jobs(arguments), finish)


def jobs(arguments: argparse.Namespace) -> list[Job]:
    """One cell after the other.  Raises InputError."""
    names = arguments.provider or providers()
    made = [plan([cell], names, ablations=False) for cell in cells(arguments)]
    return list(dict.fromkeys(job for of_cell in made for job in of_cell))


def providers() -> list[str]:
    """Of the library's table.  Its learned optimizer without files is random nets; scales go by their recipe."""
    named = ["random" if name == "zo-finetuner" else name for name in METHODS if name not in NOT_RUN]
    return [*named, "improved", *ON_SCALES]


def cells(arguments: argparse.Namespace) -> list[Cell]:
    if arguments.model or arguments.task or arguments.quick:
        return grid(arguments.shared, arguments.model, arguments.task, arguments.quick, arguments.steps)
    return [Cell(str(Path(arguments.shared) / "models" / model), task, arguments.steps or steps)
            for model, task, steps in CELLS]  # fmt: skip


def finish(place: Place) -> None:
    rows = newest(read(place.rows))
    print(table(rows))
    draw(rows, place.out / "methods.png")
