"""results/step.png: where the time of a step goes, a stack of phases per provider, a panel per batch."""

from __future__ import annotations

import math
from pathlib import Path

from bench.providers import PROVIDERS
from bench.shares import PHASES
from bench.step_tables import KEY
from bench.tables import SHORT, Row, is_gpu, latest_machine, median

COLUMNS = 4
COLORS = {"ask": "C4", "probe": "C1", "forward": "C0", "loss": "C9", "tell": "C6", "update": "C3", "other": "0.7"}
LABELS = {
    "inference": "two forwards",
    "zo_finetuner": "ours, MeZO",
    "zo_finetuner_learned": "ours, nets",
    "zo_finetuner_lozo": "ours, LOZO",
    "inference_graph": "two forwards,\na graph",
    "zo_finetuner_graph": "ours, MeZO,\na graph",
    "reference_noise": "MeZO's sweeps,\nour forward",
    "mezo_reference": "MeZO's order",
    "zo_finetuner_reference": "ZO Fine-tuner's\norder",
}


def draw(rows: list[Row], path: Path) -> None:
    """Of the last machine with a GPU and of the last without, all batches that were measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [r for r in rows if r["case"] == "step" and not r.get("shrink")]
    kept = [r for gpu in (False, True) for r in latest_machine(r for r in steps if is_gpu(r) == gpu)]
    keys = list(dict.fromkeys(tuple(map(r.get, KEY)) for r in kept))
    columns = min(COLUMNS, max(1, len(keys)))
    lines = max(1, math.ceil(len(keys) / columns))
    figure, axes = plt.subplots(lines, columns, figsize=(3.6 * columns, 3.6 * lines + 0.6), squeeze=False)
    for panel, key in zip(axes.flat, keys, strict=False):
        _panel(panel, kept, dict(zip(KEY, key, strict=True)))
    for panel in list(axes.flat)[len(keys) :]:
        panel.axis("off")
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[name]) for name in PHASES]
    figure.legend(handles, PHASES, ncol=len(PHASES), loc="upper center", fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.4 / (3.6 * lines + 0.6)))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _panel(axes, rows: list[Row], wanted: dict) -> None:
    times = {name: median(rows, provider=name, metric="time_s", **wanted) for name in PROVIDERS}
    times = {name: seconds for name, seconds in times.items() if seconds is not None}
    for x, (name, seconds) in enumerate(times.items()):
        shares = {p: median(rows, provider=name, metric="share", phase=p, **wanted) for p in PHASES}
        if not any(shares.values()):  # measured as a whole only
            axes.bar(x, seconds * 1e3, 0.8, facecolor="none", edgecolor="0.5")
        bottom = 0.0
        for part, share in shares.items():
            axes.bar(x, (share or 0) * seconds * 1e3, 0.8, bottom=bottom, color=COLORS[part])
            bottom += (share or 0) * seconds * 1e3
    axes.set_xticks(range(len(times)), [LABELS.get(name, name) for name in times], rotation=40, ha="right", fontsize=7)
    axes.set_ylabel("ms a step")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    batch = f"batch {wanted['n']}" if wanted["filled"] is None else f"{wanted['filled']:,} tokens"
    where = wanted["device"] + (f", {wanted['threads']} threads" if wanted["threads"] else "")
    axes.set_title(f"{wanted['model']}, {SHORT[wanted['dtype']]}, {wanted['task']}, {batch}\n{where}", fontsize=8)
