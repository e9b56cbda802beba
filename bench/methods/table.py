"""Rows -> a table per cell: every method's held-out loss against MeZO's, what it cost and what it keeps.

better, worse    every seed below, or above, every seed of MeZO's (of three and three: by chance one in 20 each)
equal            within the seeds' spread: anything else
"""

from __future__ import annotations

import statistics
from typing import Any

from bench.quality.verdict import CellRows, Outcome, cells_of, number
from bench.tables import table as markdown

Row = dict[str, Any]
LABELS = {
    "random": "zo-finetuner (random nets)",
    "improved": "zo-finetuner (improved scales)",
    "es, improved scales": "es (improved scales)",
    "fzoo, improved scales": "fzoo (improved scales)",
}
HEADER = ["method", "against MeZO", "held-out loss, median", "min..max", "accuracy", "forwards a step", "forwards",
          "rate", "seconds", "state"]  # fmt: skip


def measured(rows: list[Row]) -> list[CellRows]:
    """Cells that Adam can learn and MeZO has run on."""
    return [cell for cell in cells_of(rows, "methods") if cell.learnable and "mezo" in cell.outcomes]


def against_mezo(outcome: Outcome, mezo: Outcome) -> str:
    if outcome is mezo:
        return ""
    if outcome.below(mezo):
        return "better"
    return "worse" if mezo.below(outcome) else "equal"


def ranked(cell: CellRows) -> list[tuple[str, Outcome]]:
    """Methods by their median loss, first-order Adam left out."""
    others = ((name, outcome) for name, outcome in cell.outcomes.items() if name != "adam")
    return sorted(others, key=lambda pair: pair[1].loss)


def label(name: str) -> str:
    return LABELS.get(name, name)


def table(rows: list[Row]) -> str:
    """The tables and what they say."""
    cells = measured(rows)
    if not cells:
        return "No rows: `python -m bench methods`."
    return "\n\n".join(part for cell in cells for part in (_table(cell), "  \n".join(sentences(cell))))


def _table(cell: CellRows) -> str:
    adam, first = cell.outcomes["adam"], cell.any_row
    lines = [["before", "", number(first["base_loss"]), "", _share(first.get("base_accuracy")), "", "", "", "", ""]]
    if "prior_loss" in first:
        lines.append(["always the training prior", "", number(first["prior_loss"]), *[""] * 7])
    lines += [_line(label(name), outcome, cell.outcomes["mezo"]) for name, outcome in ranked(cell)]
    steps = f"{adam.rows[0]['curve'][-1][0]:.0f} steps"
    lines.append(["Adam, first order", "", number(adam.loss), _ends(adam), _accuracy(adam), "", steps,
                  f"{adam.rows[0]['lr']:.1g}", _seconds(adam), "2.00 and gradients"])  # fmt: skip
    told = [i for i in range(len(HEADER)) if any(line[i] for line in lines)]  # text has no accuracy
    kept = [[line[i] for i in told] for line in (HEADER, *lines)]
    return f"{cell.name}, {2 * cell.steps:,} forwards\n\n" + markdown(kept[0], kept[1:])


def _line(name: str, outcome: Outcome, mezo: Outcome) -> list[str]:
    row, verdict = outcome.rows[0], against_mezo(outcome, mezo)
    return [
        f"`{name}`" if " " not in name else name, f"**{verdict}**" if verdict == "better" else verdict,
        number(outcome.loss), _ends(outcome), _accuracy(outcome), str(row["forwards_per_step"]), f"{row['forwards']:,}",
        f"{row['lr']:.1e}", _seconds(outcome), f"{row['state']:.2f}" if row["state"] >= 0.005 else "-",
    ]  # fmt: skip


def _ends(outcome: Outcome) -> str:
    return f"{number(min(outcome.losses))}..{number(max(outcome.losses))}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}".removeprefix("0")


def _accuracy(outcome: Outcome) -> str:
    values = [row["accuracy"] for row in outcome.rows if "accuracy" in row]
    return _share(statistics.median(values) if values else None)


def _seconds(outcome: Outcome) -> str:
    return f"{statistics.median(row['processor_s'] for row in outcome.rows):.1f}"


def sentences(cell: CellRows) -> list[str]:
    """Which methods beat MeZO and which do not; what is to be known of rates and runs."""
    mezo, groups = cell.outcomes["mezo"], {"better": [], "equal": [], "worse": []}
    for name, outcome in ranked(cell):
        if outcome is not mezo:
            groups[against_mezo(outcome, mezo)].append(label(name))
    meanings = {"better": "Better than MeZO at equal forwards (every seed below every seed of MeZO's)",
                "equal": "Equal within the seeds' spread", "worse": "Worse (every seed above)"}  # fmt: skip
    lines = [f"{meanings[verdict]}: {', '.join(names) or 'none'}." for verdict, names in groups.items()]
    edges = [label(name) for name, outcome in ranked(cell) if outcome.rows[0].get("edge")]
    if edges:
        lines.append(f"Best rate at the end of those tried: {', '.join(edges)}.")
    diverged = [f"{label(name)} ({sum(row['diverged'] for row in outcome.rows)} of {len(outcome.rows)})"
                for name, outcome in ranked(cell) if any(row["diverged"] for row in outcome.rows)]  # fmt: skip
    if diverged:
        lines.append(f"Seeds that diverged at the rate that was best on dev rows: {', '.join(diverged)}.")
    return lines
