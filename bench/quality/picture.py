"""quality.png: held-out loss against forwards, a panel per learnable cell, the seeds' spread shaded."""

from __future__ import annotations

from pathlib import Path

from bench.quality.verdict import LABELS, CellRows, Row, cells_of, compared_in

COLUMNS = 3


def draw(rows: list[Row], path: Path) -> bool:
    """False, and nothing written, where no learnable cell has a curve."""
    cells = [cell for cell in cells_of(rows) if cell.learnable and "mezo" in cell.outcomes]
    if not cells:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = compared_in(cells)
    columns = min(COLUMNS, len(cells))
    lines = -(-len(cells) // columns)
    figure, panels = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.4 * lines), squeeze=False)
    for axes, cell in zip(panels.flat, cells, strict=False):
        _panel(axes, cell, names)
    for axes in panels.flat[len(cells) :]:
        axes.axis("off")
    handles = {label: handle for axes in panels.flat for handle, label in zip(*axes.get_legend_handles_labels(),
                                                                           strict=True)}  # fmt: skip
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncol=5, fontsize=8)
    figure.tight_layout(rect=(0, 0.06 + 0.02 * (lines == 1), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _panel(axes, cell: CellRows, names: list[str]) -> None:
    last = []
    for i, name in enumerate(names):
        outcome = cell.outcomes.get(name)
        if outcome is None:
            continue
        forwards, median = zip(*outcome.curve, strict=True)
        seeds = [dict(map(tuple, row["curve"])) for row in outcome.rows]
        low, high = ([pick(s[x] for s in seeds) for x in forwards] for pick in (min, max))
        axes.plot(forwards, median, color=f"C{i}", marker=".", markersize=4, label=LABELS.get(name, name))
        axes.fill_between(forwards, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
        last += median[2:]
    if "prior_loss" in cell.any_row:
        axes.axhline(cell.any_row["prior_loss"], color="gray", linestyle="--", linewidth=1, label="training prior")
        last.append(cell.any_row["prior_loss"])
    room = 0.1 * (max(last) - min(last))
    axes.set_ylim(min(last) - room, max(last) + room)  # the first fall is left out: all share it
    axes.set_title(f"{cell.name} (Adam {cell.outcomes['adam'].loss:.3f})", fontsize=9)
    axes.set_xlabel("forwards", fontsize=8)
    axes.set_ylabel("held-out loss", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
