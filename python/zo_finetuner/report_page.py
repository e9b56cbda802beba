"""`zo report`: runs side by side as one HTML page without anything from outside, and one picture.

Tables of results, of seeds and of the settings that differ, and the curves as inline SVG.  `zo train` writes the page
of its run when it ends.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from zo_finetuner.curves import colour, draw_picture, draw_svg, panels
from zo_finetuner.errors import InputError
from zo_finetuner.files import make_folder, write_text
from zo_finetuner.progress import clock
from zo_finetuner.runs import Group, Run, brief, differing, grouped, is_finite, read_run

PAGE, PICTURE = "report.html", "curve.png"


def report(folders: Sequence[Path], output: Path | None = None, overwrite: bool = False) -> tuple[Path, Path]:
    """Read the runs and write page and picture; returns their paths.  One run has them in its own folder, several in
    `output` (default: report.html here), which must not exist unless `overwrite`.  Raises InputError."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("a run is named twice")
    runs = [read_run(folder) for folder in folders]
    if output is None and len(folders) == 1:
        page, picture = folders[0] / PAGE, folders[0] / PICTURE
    else:
        page = Path(PAGE) if output is None else output
        if page.suffix != ".html":
            raise InputError(f"{page}: the page is a .html; change the suffix")
        picture = page.with_suffix(".png")
        for path in (page, picture):
            if path.exists() and not overwrite:
                raise InputError(f"{path}: exists; give --output another name, or --overwrite")
        make_folder(page.parent)
    write_report(runs, page, picture)
    return page, picture


def write_report(runs: Sequence[Run], page: Path, picture: Path) -> None:
    """The page and the picture of runs that were read."""
    groups = grouped(runs)
    draw_picture(picture, groups, title_of(runs))
    write_text(page, html_page(runs, groups))


def title_of(runs: Sequence[Run]) -> str:
    """`sst2 on imdb-llama-6m`, of what all runs share."""
    shared = [{brief(run.config.get(name)) for run in runs} for name in ("task", "model")]
    task, model = (found.pop() if len(found) == 1 else "" for found in shared)
    task = "" if task == "-" else task
    text = " on ".join(part for part in (task, model) if part)
    if len(runs) > 1:
        return f"{len(runs)} runs" + (f": {text}" if text else "")
    return f"{text}, {runs[0].config.get('optimizer', '')}"


def html_page(runs: Sequence[Run], groups: Sequence[Group]) -> str:
    """The whole page."""
    title = escape(title_of(runs))
    legend = "".join(f'<span><i style="background:{colour(i)}"></i>{escape(g.label)}</span>'
                     for i, g in enumerate(groups)) if len(groups) > 1 else ""  # fmt: skip
    drawn = "".join(f"<figure>{draw_svg(panel, i)}</figure>\n" for i, panel in enumerate(panels(groups)))
    parts = [
        f"<h1>{title}</h1>",
        *(f"<p>{sentence}</p>" for sentence in summary(runs)),
        "<h2>Results</h2>", table(*results(runs, groups)),
        *(["<h2>Seeds</h2>", table(*seeds(groups))] if any(len(g.runs) > 1 for g in groups) else []),
        "<h2>Curves</h2>",
        f'<div class="legend">{legend}</div>' if legend else "",
        f'<div class="panels">\n{drawn}</div>' if drawn else "<p>The log has no entry yet.</p>",
        *settings(runs),
    ]  # fmt: skip
    body = "\n".join(part for part in parts if part)
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
            f"<body>\n{body}\n</body>\n</html>\n")  # fmt: skip


#: Settings that decide which rows are tested, and by what.
COMPARED = ("task", "data", "test_data", "columns", "objective", "maximize", "num_eval", "data_seed", "max_length")


def summary(runs: Sequence[Run]) -> list[str]:
    """One run in a sentence; of several, which ended best."""
    done = [run for run in runs if is_finite(run.result.get("eval_loss_after"))]
    if not done:
        return ["No run has ended yet." if len(runs) > 1 else f"Not ended: {runs[0].steps} of "
                f"{escape(str(runs[0].config.get('steps', '?')))} steps are in the log."]  # fmt: skip
    rows = [name for name in differing(runs) if name in COMPARED]
    if rows:
        return [f"The runs differ in {', '.join(rows)}: their test losses do not compare."]
    best = min(done, key=lambda run: run.result["eval_loss_after"])
    r = best.result
    metric = escape(str(r.get("metric")))
    text = (f"held-out loss {arrow(r, 'eval_loss', 4)}, {metric} {arrow(r, 'eval_metric', 3)} on "
            f"{r.get('eval_rows', '?')} test rows, {r.get('forwards', 0):,} forwards, no backward pass")  # fmt: skip
    return [f"Lowest at the end: {escape(best.name)}: {text}." if len(runs) > 1 else text[0].upper() + text[1:] + "."]


def arrow(result: dict[str, Any], key: str, digits: int) -> str:
    before, after = result.get(f"{key}_before"), result.get(f"{key}_after")
    return f"{number(before, digits)} &rarr; <b>{number(after, digits)}</b>"


def number(value: Any, digits: int) -> str:
    return f"{value:,.{digits}f}" if is_finite(value) else "-"


def results(runs: Sequence[Run], groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """(header, a line per run)"""
    header = ["run", "seed", "steps", "forwards", "test loss", "test metric", "best dev loss", "a step", "tokens/s",
              "skipped", "peak memory", "time"]  # fmt: skip
    lines = []
    for i, group in enumerate(groups):
        for run in group.runs:
            r = run.result
            mark = f'<i style="background:{colour(i)}"></i>' if len(groups) > 1 else ""
            seconds = run.middle("zo/seconds_per_step")
            peak = (r.get("peak_bytes") or {}).get("training")
            dev = run.series("eval_loss")
            best = min(zip(dev[1], dev[0], strict=True), default=None)
            skipped = r.get("skipped_steps", max(run.series("zo/skipped_steps")[1], default=0))
            lines.append([
                f"{mark}{escape(run.name)}",
                escape(str(run.config.get("seed", ""))),
                f"{run.steps:,}" + ("" if r else f" of {escape(str(run.config.get('steps', '?')))}"),
                number(run.steps * run.forwards_per_step, 0) if run.forwards_per_step else "-",
                arrow(r, "eval_loss", 4) if r else "not ended",
                f"{escape(str(r.get('metric')))} {arrow(r, 'eval_metric', 3)}" if r else "",
                f"{best[0]:.4f} at {best[1]:,}" if best else "-",
                "-" if seconds is None else f"{seconds * 1e3:,.1f} ms",
                number(run.middle("zo/tokens_per_second"), 0),
                number(skipped, 0),
                f"{peak / 2**30:.2f} GiB" if is_finite(peak) else "-",
                clock(r["seconds"]) if is_finite(r.get("seconds")) else "-",
            ])  # fmt: skip
    kept = [i for i in range(len(header)) if i == 0 or {line[i] for line in lines} - {"-", ""}]
    return [header[i] for i in kept], [[line[i] for i in kept] for line in lines]


def seeds(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """(header, a line per group): median and range of the test loss and metric over seeds."""
    lines = []
    for i, group in enumerate(groups):
        cells = []
        for key, digits in (("eval_loss_after", 4), ("eval_metric_after", 3)):
            values = [run.result[key] for run in group.runs if is_finite(run.result.get(key))]
            cells += [number(statistics.median(values), digits),
                      f"{min(values):.{digits}f} to {max(values):.{digits}f}"] if values else ["-", ""]  # fmt: skip
        mark = f'<i style="background:{colour(i)}"></i>' if len(groups) > 1 else ""
        lines.append([f"{mark}{escape(group.label)}", *cells])
    return ["settings", "test loss, median", "min to max", "test metric, median", "min to max"], lines


def settings(runs: Sequence[Run]) -> list[str]:
    """Settings that differ as a table, the others and the data folded away."""
    parts, varied = [], [name for name in differing(runs) if name != "seed"]
    if len(runs) > 1 and varied:
        lines = [[escape(run.name), *(escape(brief(run.config.get(name))) for name in varied)] for run in runs]
        parts += ["<h2>Settings that differ</h2>", table(["run", *map(escape, varied)], lines)]
    shared = {name: value for name, value in runs[0].config.items() if name not in (*varied, "output_dir", "seed")}
    what = "Settings" if len(runs) == 1 else "Settings that all runs share"
    if len(runs) == 1:
        shared |= {"seed": runs[0].config.get("seed")}
    data = runs[0].result.get("data")
    text = yaml.safe_dump(shared, sort_keys=False) + (yaml.safe_dump({"rows": data}, sort_keys=False) if data else "")
    command = f"zo train --config {runs[0].name}/config.yaml --output-dir ELSEWHERE"
    return [*parts, f"<details><summary>{what}</summary><pre>{escape(text)}</pre></details>",
            f"<p>The same run again: <code>{escape(command)}</code></p>" if len(runs) == 1 else ""]  # fmt: skip


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Cells are HTML."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    rows = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>\n" for line in lines)
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{rows}</table></div>'


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5c6670; --rule: #dde1e6; --ground: #ffffff; --card: #f7f8fa }
@media (prefers-color-scheme: dark) {
  :root { --ink: #d9dee4; --soft: #98a2ad; --rule: #333a42; --ground: #14171b; --card: #1b1f25 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 2rem auto;
  max-width: 78rem; padding: 0 1.2rem }
h1 { font-size: 1.5rem; margin: 0 0 .3rem } h2 { font-size: 1.05rem; margin: 2rem 0 .6rem }
p { margin: .3rem 0 } code, pre { font: 13px/1.45 ui-monospace, monospace }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--rule); white-space: nowrap }
th { color: var(--soft); font-weight: 500 }
i { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; margin-bottom: .6rem }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(23rem, 100%), 1fr)); gap: 1rem }
figure { margin: 0; padding: .6rem; background: var(--card); border: 1px solid var(--rule); border-radius: 6px }
figure svg { display: block; width: 100%; height: auto; color: var(--ink) }
details { margin-top: 2rem } summary { cursor: pointer; color: var(--soft) } pre { overflow-x: auto }
"""
