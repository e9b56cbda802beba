"""Rows -> the tables of docs/when.md: what first order learns beside zeroth order, and what it needs."""

from __future__ import annotations

import statistics

from bench.methods.table import label, measured, ranked
from bench.quality.verdict import Outcome, number
from bench.tables import Row, median, table


def first_order(rows: list[Row]) -> str:
    """A line per cell that first-order Adam can learn."""
    cells = measured(rows)
    if not cells:
        return "No rows: `python -m bench methods`."
    lines = []
    for cell in cells:
        name, best = ranked(cell)[0]
        mezo, adam = cell.outcomes["mezo"], cell.outcomes["adam"]
        lines.append([
            f"{cell.name}, {2 * cell.steps:,} forwards",
            number(cell.any_row["base_loss"]),
            _spent(mezo),
            f"{_spent(best)}: {label(name)}",
            f"{_spent(adam)}: {adam.rows[0]['curve'][-1][0]:.0f} steps",
        ])  # fmt: skip
    return table(["held-out loss, median of seeds", "before", "MeZO", "best zeroth order", "Adam, first order"], lines)


def _spent(outcome: Outcome) -> str:
    return f"{number(outcome.loss)} in {statistics.median(row['processor_s'] for row in outcome.rows):.0f} s"


def memory(rows: list[Row]) -> str:
    """A line per model that a recipe trains whole: predicted bytes."""
    mine = [r for r in rows if r["case"] == "recipes"]
    if not mine:
        return "No rows: `python -m bench recipes`."
    lines = []
    from bench.recipes import recipes  # takes transformers, which a list of cases does not wait for

    for name, recipe in recipes().items():
        own = [r for r in mine if r["provider"] == name]
        if recipe.adapter or recipe.optimizer != "mezo" or not recipe.task:
            continue
        values = (median(own, metric=f"{metric}_bytes") for metric in ("inference", "peak", "adam"))
        cells = [f"{value / 2**30:.1f} GiB" if value else "" for value in values]
        lines.append([f"{recipe.model.split('/')[-1]}, {recipe.dtype}", *cells])
    return table(["predicted, 16 rows of 256 tokens", "inference", "a step of MeZO", "a step of Adam"], lines)
