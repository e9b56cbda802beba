"""Curves of runs: what there is to see in their logs, as lines on panels, and the panels drawn.

A panel is a description; `draw_picture` makes one PNG of all, `draw_svg` an SVG of one that takes the colour of the
text around it, for a page in light and dark.  Runs that differ in their seed alone share a colour: a thin line each,
and their median.
"""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo_finetuner.files import write_bytes
from zo_finetuner.progress import TIMES
from zo_finetuner.runs import Group, Run

#: Readable on white and on black.
COLOURS = ("#4c78d8", "#e07b39", "#3a9d5d", "#c44e8a", "#8c6bd1", "#a0803c", "#2aa1b3", "#d64545")
POINTS = 300  # of a line at the most; more are averaged
INK = "#0a0b0c"  # stands for the page's text colour
WIDE, HIGH = 4.6, 2.9  # inches of a panel


@dataclass(frozen=True)
class Line:
    """style: "line", "thin" (a seed among several), "faint" (before smoothing), "points" (with a mark each)."""

    x: Sequence[float]
    y: Sequence[float]
    colour: str
    style: str = "line"
    label: str = ""


@dataclass(frozen=True)
class Panel:
    """level: a labelled horizontal line.  steps: how many steps a unit of x is, for a second axis; None for none."""

    title: str
    lines: tuple[Line, ...]
    x: str
    logarithmic: bool = False
    level: tuple[str, float] | None = None
    steps: float | None = None

    @property
    def legend(self) -> bool:
        return any(line.label for line in self.lines)


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def panels(groups: Sequence[Group]) -> list[Panel]:
    """Everything that these runs' logs can show."""
    runs = [run for group in groups for run in group.runs]
    ratios = {run.forwards_per_step for run in runs}
    forwards = None not in ratios
    steps = 1 / ratios.pop() if forwards and len(ratios) == 1 else None

    def panel(title: str, key: str, style: str = "line", by_steps: bool = False, **more: Any) -> list[Panel]:
        """A panel of one key of the log, none where no run has it."""
        lines = [line for number, group in enumerate(groups)
                 for line in _lines(group, key, colour(number), style, forwards and not by_steps)]  # fmt: skip
        x = "forwards" if forwards and not by_steps else "steps"
        return [Panel(title, tuple(lines), x, steps=steps if x == "forwards" else None, **more)] if lines else []

    found = panel("training loss", "loss", "smooth")
    found += panel("held-out loss (dev rows)", "eval_loss", "points", level=_prior(runs))
    if forwards and steps is None:  # methods of other forwards per step
        found += panel("held-out loss against steps", "eval_loss", "points", by_steps=True)
    metrics = dict.fromkeys(key for run in runs for key in run.keys("eval_") if key not in TIMES)
    for key in metrics:
        found += panel(f"held-out {key.removeprefix('eval_')} (dev rows)", key, "points")
    found += panel("|g|, the projected gradient", "grad_norm", "smooth", logarithmic=True)
    for what in ("skipped", "clipped", "flat"):
        if any(max(run.series(f"zo/{what}_steps")[1], default=0) > 0 for run in runs):
            found += panel(f"{what} steps so far", f"zo/{what}_steps")
    for group in groups:
        found += _sigma(group, forwards, steps, group.label if len(groups) > 1 else "")
    if any(len(set(run.series("learning_rate")[1])) > 1 for run in runs):
        found += panel("learning rate", "learning_rate")
    found += panel("seconds of a step", "zo/seconds_per_step")
    found += panel("tokens per second", "zo/tokens_per_second")
    return found


def _prior(runs: Iterable[Run]) -> tuple[str, float] | None:
    priors = {run.result.get("prior_loss") for run in runs}
    prior = priors.pop() if len(priors) == 1 else None
    return None if prior is None else ("always the training prior", prior)


def _lines(group: Group, key: str, colour: str, style: str, forwards: bool) -> list[Line]:
    series = []
    for run in group.runs:
        steps, values = run.series(key)
        if values:
            series.append(([s * run.forwards_per_step for s in steps] if forwards else steps, values))
    if not series:
        return []
    if len(series) == 1:
        x, y = thinned(*series[0])
        if style == "smooth" and len(y) > 10:
            return [Line(x, y, colour, "faint"), Line(x, smoothed(y), colour)]
        return [Line(x, y, colour, "line" if style == "smooth" else style)]
    middle = median_of(series)
    if style == "smooth":
        return [*(Line(*_smooth(s), colour, "thin") for s in series), Line(*_smooth(middle), colour)]
    return [*(Line(*thinned(*s), colour, "thin") for s in series), Line(*thinned(*middle), colour, style)]


def _sigma(group: Group, forwards: bool, steps: float | None, whose: str) -> list[Panel]:
    """Scales by kind of block, of a group's first run."""
    run = group.runs[0]
    factor = run.forwards_per_step if forwards else 1
    lines = []
    for number, key in enumerate(run.keys("zo/sigma/")):
        at, values = run.series(key)
        if values and min(values) > 0:
            x, y = thinned([s * factor for s in at], values)
            lines.append(Line(x, y, colour(number), "line" if number < len(COLOURS) else "dashed",
                              key.removeprefix("zo/sigma/")))  # fmt: skip
    if not lines:
        return []
    title = "sigma by kind of block" + (f": {whose}" if whose else "")
    return [Panel(title, tuple(lines), "forwards" if forwards else "steps", logarithmic=True, steps=steps)]


def median_of(series: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[list[float], list[float]]:
    """The median over series where all of them have a point."""
    tables = [dict(zip(x, y, strict=True)) for x, y in series]
    shared = [x for x in tables[0] if all(x in table for table in tables)]
    return shared, [statistics.median(table[x] for table in tables) for x in shared]


def thinned(x: Sequence[float], y: Sequence[float], most: int = POINTS) -> tuple[list[float], list[float]]:
    """Means of as many neighbours as leave `most` points or fewer."""
    width = -(-len(y) // most)
    if width <= 1:
        return list(x), list(y)
    bins = range(0, len(y), width)
    return [x[min(i + width, len(x)) - 1] for i in bins], [statistics.fmean(y[i : i + width]) for i in bins]


def smoothed(y: Sequence[float]) -> list[float]:
    """A running mean over a tenth of the points."""
    half = max(1, len(y) // 20)
    return [statistics.fmean(y[max(0, i - half) : i + half + 1]) for i in range(len(y))]


def _smooth(series: tuple[Sequence[float], Sequence[float]]) -> tuple[list[float], list[float]]:
    x, y = thinned(*series)
    return x, smoothed(y) if len(y) > 10 else y


def draw_picture(path: Path, groups: Sequence[Group], title: str) -> None:
    """All panels as one PNG."""
    shown, plt = panels(groups), _matplotlib()
    with plt.rc_context(_style("#202124")):
        columns = min(3, max(1, len(shown)))
        rows = max(1, -(-len(shown) // columns))
        figure = plt.figure(figsize=(WIDE * columns, HIGH * rows + 0.7), layout="constrained")
        figure.suptitle(title, fontsize=11)
        for number, panel in enumerate(shown):
            draw(figure.add_subplot(rows, columns, number + 1), panel)
        if len(groups) > 1:
            marks = [plt.Line2D([], [], color=colour(i), label=f" {g.label}") for i, g in enumerate(groups)]
            figure.legend(handles=marks, loc="outside lower center", ncols=min(4, len(groups)), frameon=False)
        picture = io.BytesIO()
        figure.savefig(picture, dpi=110, format="png")
        plt.close(figure)
    write_bytes(path, picture.getvalue())


def draw_svg(panel: Panel, number: int) -> str:
    """A panel as an `<svg>` element, `currentColor` its ink.  number: of the panel on its page, keeps names apart."""
    plt = _matplotlib()
    with plt.rc_context(_style(INK) | {"svg.fonttype": "none", "svg.hashsalt": str(number)}):
        figure = plt.figure(figsize=(WIDE, HIGH), layout="constrained")
        draw(figure.add_subplot(), panel)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="(?:[a-z]+_\d+|[a-z]+\d_\d+|[a-zA-Z]+_[\d_]+)"', "", svg)  # groups that nothing points to
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r"\1", svg.replace("\n", " ", 3), count=1)
    return re.sub(r"\n\s*", "\n", svg.replace(INK, "currentColor")).strip()


def draw(axes: Any, panel: Panel) -> None:
    """A panel on matplotlib's axes.  A logarithmic one has a linear axis where that is enough."""
    from matplotlib import ticker

    look = {
        "line": {"linewidth": 1.5},
        "dashed": {"linewidth": 1.5, "linestyle": "--"},
        "points": {"linewidth": 1.5, "marker": "o", "markersize": 3},
        "thin": {"linewidth": 0.8, "alpha": 0.55},
        "faint": {"linewidth": 0.8, "alpha": 0.3},
    }
    for line in panel.lines:
        axes.plot(line.x, line.y, color=line.colour, label=line.label or "_", **look[line.style])
    if panel.level is not None:
        name, value = panel.level
        axes.axhline(value, color="#808890", linestyle="--", linewidth=1)
        axes.annotate(name, (1, value), xycoords=("axes fraction", "data"), xytext=(-2, 2), textcoords="offset points",
                      ha="right", va="bottom", fontsize=7, color="#808890")  # fmt: skip
    axes.set_title(panel.title, fontsize=9, loc="left", fontweight="bold")
    axes.set_xlabel(panel.x)
    axes.margins(x=0.02)
    values = [value for line in panel.lines for value in line.y if value > 0]
    if panel.logarithmic and values and max(values) > 10 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 3.0) if max(values) < 1e3 * min(values) else (1.0,)))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: short_number(value))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(lambda value, _: short_number(value))
    if panel.steps is not None:
        ratio = panel.steps
        top = axes.secondary_xaxis("top", functions=(lambda x: x * ratio, lambda x: x / ratio))
        top.xaxis.set_major_formatter(lambda value, _: short_number(value))
        top.spines["top"].set_visible(False)
        top.tick_params(length=0, labelsize=7)
        axes.annotate("steps", (0, 1), xycoords="axes fraction", xytext=(-4, 3), textcoords="offset points", ha="right",
                      va="bottom", fontsize=7)  # fmt: skip
    if panel.legend:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7, frameon=False, handlelength=1.2,
                    labelspacing=0.35)  # fmt: skip


def short_number(value: float) -> str:
    """1500 -> `1.5k`"""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _style(ink: str) -> dict[str, Any]:
    named = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    return {name: ink for name in named} | {
        "grid.color": "#808890", "font.size": 8, "axes.labelsize": 8, "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"], "axes.formatter.useoffset": False, "text.parse_math": False,
        "axes.unicode_minus": False, "axes.linewidth": 0.7, "path.simplify": True,
    }  # fmt: skip


def _matplotlib() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
