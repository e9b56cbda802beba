"""Pictures of runs: held-out loss and metric against forwards."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from zo_finetuner.files import write_bytes


def draw_curves(
    path: Path,
    histories: dict[str, list[dict[str, Any]]],
    title: str,
    *,
    reference: tuple[str, float] | None = None,
) -> None:
    """One line per run: its Trainer log history (entries with `eval_loss`, and with `loss` for a single run).

    reference: a labelled horizontal line, e.g. the loss of always answering the training prior."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    evaluations = [e for h in histories.values() for e in h if "eval_loss" in e]
    metric = next((k for e in evaluations for k in e if k.startswith("eval_") and k != "eval_loss"), "eval_loss")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for name, history in histories.items():
        evaluated = [e for e in history if "eval_loss" in e]
        steps = [e["step"] for e in evaluated]
        line = left.plot(steps, [e["eval_loss"] for e in evaluated], marker="o", markersize=3, label=name)
        if len(histories) == 1:
            logged = [e for e in history if "loss" in e]
            left.plot([e["step"] for e in logged], [e["loss"] for e in logged], alpha=0.3, color=line[0].get_color(),
                      label="training batches")
        right.plot(steps, [e[metric] for e in evaluated], marker="o", markersize=3, label=name)
    if reference is not None:
        left.axhline(reference[1], color="gray", linestyle="--", linewidth=1, label=reference[0])
    for axes, label in ((left, "held-out loss"), (right, "held-out " + metric.removeprefix("eval_"))):
        axes.set_xlabel("steps (two forwards each)")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    plt.close(figure)
    write_bytes(path, picture.getvalue())
