"""methods.png: held-out loss of every method, a dot per seed, methods by their median; a panel per cell."""

from __future__ import annotations

from pathlib import Path

from bench.methods.table import Row, against_mezo, label, measured, ranked

COLOURS = {"better": "C2", "equal": "C7", "worse": "C3", "": "C0"}


def draw(rows: list[Row], path: Path) -> bool:
    """False, and nothing written, where no learnable cell has been measured."""
    cells = measured(rows)
    if not cells:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tallest = max(len(cell.outcomes) for cell in cells)
    figure, panels = plt.subplots(1, len(cells), figsize=(6.2 * len(cells), 1.4 + 0.25 * tallest), squeeze=False)
    for axes, cell in zip(panels.flat, cells, strict=True):
        _panel(axes, cell)
    names = {"": "MeZO", "better": "better", "equal": "equal within the seeds' spread", "worse": "worse"}
    handles = [plt.Line2D([], [], color=COLOURS[verdict], marker="o", markersize=4) for verdict in names]
    figure.legend(handles, names.values(), loc="lower center", ncol=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _panel(axes, cell) -> None:
    mezo, lines = cell.outcomes["mezo"], ranked(cell)
    for y, (_, outcome) in enumerate(lines):
        verdict = against_mezo(outcome, mezo)
        axes.plot([min(outcome.losses), max(outcome.losses)], [y, y], color=COLOURS[verdict], linewidth=1.2)
        axes.plot(outcome.losses, [y] * len(outcome.losses), "o", color=COLOURS[verdict], markersize=3.5, alpha=0.7)
        axes.plot([outcome.loss], [y], "|", color=COLOURS[verdict], markersize=12, markeredgewidth=2)
    axes.axvspan(min(mezo.losses), max(mezo.losses), color=COLOURS[""], alpha=0.12, linewidth=0)
    reference, adam = cell.reference, cell.outcomes["adam"].loss
    axes.axvline(reference, color="gray", linestyle="--", linewidth=1)
    named = "training prior" if "prior_loss" in cell.any_row else "base model"
    shown = [loss for _, outcome in lines for loss in outcome.losses if loss <= reference + 0.3]
    low, high = min(*shown, reference), max(*shown, reference)
    axes.set_xlim(low - 0.06 * (high - low), high + 0.06 * (high - low))  # a run that was lost lies outside
    axes.set_yticks(range(len(lines)), [label(name) for name, _ in lines], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"held-out loss after {2 * cell.steps} forwards (dashed: {named}; first-order Adam: {adam:.3f})",
                    fontsize=8)  # fmt: skip
    axes.set_title(cell.name, fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(alpha=0.3, axis="x")
