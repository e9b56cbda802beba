"""results/kernels.png: speed-up over torch on a CPU, and share of copy bandwidth on a GPU, measured or predicted."""

from __future__ import annotations

from pathlib import Path

from bench.operations import TARGETS
from bench.tables import SHORT, Row, baseline, is_predicted, kernel_rows

COLORS = {"float32": "C0", "bfloat16": "C1", "float16": "C2"}
SPEED_UPS = ("perturb", "update", "stats", "dot", "mirror stochastic", "update scratch")
SHARES = (*TARGETS, "mirror", "update scratch", "update stats", "dot", "perturb rademacher")


def draw(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.2), width_ratios=(1, 1.4))
    _speed_ups(left, kernel_rows(rows, gpu=False))
    _shares(right, kernel_rows(rows, gpu=True), [row for row in rows if is_predicted(row)])
    for axes in (left, right):
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


Values = dict[tuple[str, str], float]  # (case, dtype) -> height


def _bars(axes, values: Values, cases: list[str], dtypes: list[str], predicted: bool = False) -> None:
    """A group of bars per case, in it a place per dtype; predicted ones are hollow and hatched."""
    width = 0.8 / max(len(dtypes), 1)
    for d, dtype in enumerate(dtypes):
        color = COLORS[dtype]
        bars = [(cases.index(case) - 0.4 + (d + 0.5) * width, v) for (case, t), v in values.items() if t == dtype]
        look = {"color": color, "label": SHORT[dtype]}
        if predicted:
            look = {"facecolor": "none", "edgecolor": color, "hatch": "///", "label": f"{SHORT[dtype]}, predicted"}
        if bars:
            axes.bar(*zip(*bars, strict=True), width * 0.92, **look)
    axes.set_xticks(range(len(cases)), cases, rotation=25, ha="right")


def _axes_of(values: Values, cases: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The cases and the dtypes that have a value, in order."""
    present = {part for key in values for part in key}
    return [case for case in cases if case in present], [dtype for dtype in COLORS if dtype in present]


def _speed_ups(axes, times: list[Row]) -> None:
    values = {}
    for row in sorted(times, key=lambda r: r["n"]):
        if row["provider"] == "cpu" and row["case"] in SPEED_UPS and not row.get("model"):
            before = baseline(times, row["case"], dtype=row["dtype"], n=row["n"])
            if before:
                values[row["case"], row["dtype"]] = before / row["p50"]
    _bars(axes, values, *_axes_of(values, SPEED_UPS))
    axes.axhline(1, color="gray", linewidth=1)
    axes.set_ylabel("times faster (measured)")
    where = f"{times[0]['device']}, {times[0].get('threads')} threads" if times else "no rows"
    axes.set_title(f"against torch; fused passes against two calls\n{where}", fontsize=9)
    if values:
        axes.legend(fontsize=8)


def _shares(axes, times: list[Row], predicted: list[Row]) -> None:
    """The largest model and the largest tensor that were measured; else what the machine code allows."""
    ours = [r for r in times if r["provider"] in ("triton", "cuda") and "share" in r and r["case"] in SHARES]
    measured = {}
    for row in sorted(ours, key=lambda r: (r["n"], r["share"])):
        measured[row["case"], row["dtype"]] = row["share"]
    hatched = {
        (r["case"], r["dtype"]): r["p50"]
        for r in predicted
        if r["metric"] == "predicted_share" and r["case"] in SHARES and r["dtype"] != "float32"
        and (r["case"], r["dtype"]) not in measured
    }  # fmt: skip
    cases, dtypes = _axes_of(measured | hatched, SHARES)
    _bars(axes, measured, cases, dtypes)
    _bars(axes, hatched, cases, dtypes, predicted=True)
    targets = [(i, TARGETS[case]) for i, case in enumerate(cases) if case in TARGETS]
    for i, target in targets:
        axes.hlines(target, i - 0.45, i + 0.45, color="black", label="target" if i == targets[0][0] else None)
    axes.set_ylim(0, 1.25)
    axes.set_ylabel("share of copy bandwidth")
    where = f"measured on {times[0]['device']}" if times else "none measured yet"
    axes.set_title(f"GPU, filled: {where}\nhatched: upper bound predicted from sm_90 machine code", fontsize=9)
    if cases:
        axes.legend(fontsize=8, loc="upper right", ncol=4)
