"""Rows -> cells, and what they say of the targets: won cells, forwards to MeZO's final loss, the random-net control.

learnable    the reference (the loss of always answering the training prior; where there is none, the base model's) is
             above first-order Adam's median by more than Adam's own spread over seeds
won          the median held-out loss is below MeZO's; clearly: the worst seed is below MeZO's best
forwards     where the median curve first meets MeZO's median final loss, as a share of MeZO's forwards
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Row = dict[str, Any]
LABELS = {
    "mezo": "MeZO",
    "random": "random nets",
    "paper": "paper's recipe",
    "published": "published nets",
    "closed-form": "closed form",
    "improved": "improved",
    "improved, several sets": "improved, several sets",
    "improved, per layer": "improved, one scale per layer",
    "improved, not normalised": "improved, not normalised",
    "improved, transferred": "improved for another model",
}
WANTED_SHARE, WANTED_FORWARDS = 0.8, 0.5


@dataclass(frozen=True)
class Outcome:
    """One method on one cell: the rows of its seeds."""

    rows: tuple[Row, ...]

    @cached_property
    def losses(self) -> list[float]:
        return [row["p50"] for row in self.rows]

    @property
    def loss(self) -> float:
        return statistics.median(self.losses)

    @property
    def spread(self) -> float:
        """Largest minus smallest."""
        return max(self.losses) - min(self.losses)

    @cached_property
    def curve(self) -> list[tuple[float, float]]:
        """(forwards, median loss) where all seeds have a point."""
        seeds = [dict(map(tuple, row["curve"])) for row in self.rows]
        return [(x, statistics.median(s[x] for s in seeds)) for x in seeds[0] if all(x in s for s in seeds)]

    def below(self, other: Outcome) -> bool:
        """Every seed below every seed of the other."""
        return max(self.losses) < min(other.losses)

    def forwards_to(self, loss: float) -> float:
        """Where the median curve first meets the loss, between points along straight lines; inf if never."""
        before = self.curve[0]
        if before[1] <= loss:
            return 0.0
        for x, y in self.curve[1:]:
            if y <= loss:
                return before[0] + (x - before[0]) * (before[1] - loss) / (before[1] - y)
            before = x, y
        return math.inf


@dataclass(frozen=True)
class CellRows:
    """All that was measured of one cell."""

    model: str
    task: str
    steps: int
    outcomes: dict[str, Outcome]

    @property
    def name(self) -> str:
        return f"{self.model}, {self.task}"

    @property
    def any_row(self) -> Row:
        return next(iter(self.outcomes.values())).rows[0]

    @property
    def reference(self) -> float:
        return self.any_row.get("prior_loss", self.any_row["base_loss"])

    @property
    def learnable(self) -> bool:
        adam = self.outcomes.get("adam")
        return adam is not None and self.reference - adam.loss > adam.spread

    def share(self, provider: str) -> float:
        """Forwards to MeZO's final loss, as a share of MeZO's."""
        mezo = self.outcomes["mezo"]
        return self.outcomes[provider].forwards_to(mezo.loss) / mezo.curve[-1][0]


def cells_of(rows: Iterable[Row], case: str = "quality") -> list[CellRows]:
    """Of every model and task the steps that most methods ran (the larger of two); a seed's newest row counts."""
    kept = [r for r in rows if r["case"] == case and r["metric"] == "test_loss"]
    cells = []
    for model, task in dict.fromkeys((r["model"], r["task"]) for r in kept):
        mine = [r for r in kept if (r["model"], r["task"]) == (model, task)]
        steps = max((len({r["provider"] for r in mine if r["steps"] == s}), s) for s in {r["steps"] for r in mine})[1]
        seeds: dict[str, dict[int, Row]] = {}
        for row in sorted((r for r in mine if r["steps"] == steps), key=lambda r: r["date"]):
            seeds.setdefault(row["provider"], {})[row["seed"]] = row
        cells.append(CellRows(model, task, steps, {name: Outcome(tuple(s.values())) for name, s in seeds.items()}))
    return sorted(cells, key=lambda cell: cell.model, reverse=True)


def compared_in(cells: list[CellRows]) -> list[str]:
    """The providers of the main table in its order; others of the library between the controls and the learned."""
    present = {name for cell in cells for name in cell.outcomes if name != "adam" and not name.startswith("improved,")}
    known = [name for name in LABELS if name in present]
    others = sorted(present - set(known))
    return [name for name in known if name != "improved"] + others + [name for name in known if name == "improved"]


def number(value: float, spread: float | None = None) -> str:
    """3.338 ± .007: the median, and half of largest minus smallest."""
    text = f"{value:.3f}"
    return text if spread is None else f"{text} ± {spread / 2:.3f}".replace("± 0.", "± .")


def table(rows: list[Row]) -> str:
    """The table: held-out losses of the learnable cells, and the lines that judge them."""
    cells = cells_of(rows)
    if not any("mezo" in cell.outcomes for cell in cells):
        return "No rows: `python -m bench quality`."
    measured = [cell for cell in cells if cell.learnable and "mezo" in cell.outcomes]
    names = compared_in(measured)
    header = ["held-out loss", "before", "Adam", *(LABELS.get(name, name) for name in names), "forwards"]
    lines = [header, ["---"] * len(header)]
    for cell in measured:
        best = min((o.loss, name) for name, o in cell.outcomes.items() if name in names)[1]
        line = [f"{cell.name}, {2 * cell.steps}", number(cell.any_row["base_loss"]), number(cell.outcomes["adam"].loss)]
        for name in names:
            outcome = cell.outcomes.get(name)
            text = "" if outcome is None else number(outcome.loss, outcome.spread)
            line.append(f"**{text}**" if name == best else text)
        line.append(_share(cell.share("improved")) if "improved" in cell.outcomes else "")
        lines.append(line)
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return text + "\n\n" + "  \n".join(verdict(cells))


def _share(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.2f}x"


def verdict(cells: list[CellRows]) -> list[str]:
    """The sentences: numbers against targets, whatever they are."""
    lines = []
    measured = [cell for cell in cells if cell.learnable and {"mezo", "improved"} <= set(cell.outcomes)]
    if not measured:
        return ["No learnable cell has both MeZO and the improved recipe."]
    count = len(measured)

    def tally(provider: str, against: str) -> str:
        both = [c.outcomes for c in measured if {provider, against} <= set(c.outcomes)]
        pairs = [(outcomes[provider], outcomes[against]) for outcomes in both]
        won, clear = sum(a.loss < b.loss for a, b in pairs), sum(a.below(b) for a, b in pairs)
        lost = sum(b.below(a) for a, b in pairs)
        return f"{won} of {len(pairs)} (every seed below every seed: {clear}; above: {lost})"

    won = sum(c.outcomes["improved"].loss < c.outcomes["mezo"].loss for c in measured) / count
    lines.append(f"Improved against MeZO, learnable cells won: {tally('improved', 'mezo')}: {won:.0%}, "
                 f"target {WANTED_SHARE:.0%}: {_met(won >= WANTED_SHARE)}.")  # fmt: skip
    shares = [cell.share("improved") for cell in measured]
    middle = statistics.median(shares)
    lines.append(f"Forwards to MeZO's final loss, median cell: {_share(middle)} (cells {_share(min(shares))} to "
                 f"{_share(max(shares))}), target {_share(WANTED_FORWARDS)}: {_met(middle <= WANTED_FORWARDS)}.")
    against = [name for name in compared_in(measured) if name not in ("mezo", "improved")]
    lines += [f"Improved against {LABELS.get(n, n)}: {tally('improved', n)}." for n in against]
    lines += [f"{LABELS.get(n, n).capitalize()} against MeZO: {tally(n, 'mezo')}." for n in against]
    for name in (name for name in LABELS if name.startswith("improved,")):
        if any(name in cell.outcomes for cell in measured):
            lines.append(f"{LABELS[name].capitalize()}, against improved: {tally(name, 'improved')}.")
    edges = [f"{cell.name} ({LABELS.get(n, n)})" for cell in measured for n, o in cell.outcomes.items()
             if n != "adam" and o.rows[0].get("edge")]  # fmt: skip
    if edges:
        lines.append(f"Best rate at the end of those tried: {', '.join(edges)}.")
    unlearnable = [cell.name for cell in cells if "adam" in cell.outcomes and not cell.learnable]
    if unlearnable:
        lines.append(f"Not learnable by first-order Adam, not run: {'; '.join(unlearnable)}.")
    lines.append("Sigma = 1 is MeZO bit for bit, and was not run twice.")
    return lines


def _met(yes: bool) -> str:
    return "met" if yes else "not met"


def report(rows: list[Row]) -> str:
    """What the command prints: the table, the learning-rate curves and the bytes."""
    lines = ["", table(rows), ""]
    quality = [row for row in rows if row["case"] == "quality"]
    for cell in cells_of(rows):
        tuned = [r for r in quality if r["metric"] == "dev_loss" and (r["model"], r["task"], r["steps"]) ==
                 (cell.model, cell.task, cell.steps)]  # fmt: skip
        for name in dict.fromkeys(row["provider"] for row in tuned):
            pairs = sorted({row["lr"]: row["p50"] for row in tuned if row["provider"] == name}.items())
            lines.append(f"{cell.name}, {name}: dev loss at rate " + ", ".join(f"{x:.1e} {y:.3f}" for x, y in pairs))
    sizes = {row["provider"]: row["p50"] for row in quality if row["metric"] == "overhead_bytes"}
    if sizes:
        lines.append("bytes held for OPT-30B's blocks: " + ", ".join(f"{k} {v:,.0f}" for k, v in sizes.items()))
    return "\n".join(lines)
