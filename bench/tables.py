"""Rows -> tables in Markdown.  A function per table: the newest row of each key in, lines out.

A row was measured on a GPU when it names a driver; `sass` rows are predicted from machine code and say so in `device`.
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable
from typing import Any

from bench.operations import LARGE, PAIRS, TARGETS

Row = dict[str, Any]
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
MODELS = {"llama-1b": "1B", "llama-8b": "8B", "opt-30b": "30B"}
NAMES = {
    "perturb": "perturb: `theta += eps z`",
    "update": "update; 16 bits rounded stochastically",
    "two-noise": "way back, update and next perturbation in one pass",
    "stats": "mean, variance, norm and non-finite count",
    "dot": "dot with the noise",
    "scratch": "scratch: `out = theta + eps z`",
    "mirror": "both signs from one read",
    "mirror stochastic": "both signs from one read",
    "update scratch": "update that ends in the next scratch",
    "update stats": "update and statistics of the new weights",
    "perturb rademacher": "perturb, random signs",
    "update rademacher": "update, random signs",
    "copy": "copy of the same bytes (the floor of a pass)",
}


def is_gpu(row: Row) -> bool:
    return bool(row.get("driver"))


def is_predicted(row: Row) -> bool:
    return row["device"].endswith("(predicted)")


def median(rows: Iterable[Row], **wanted: Any) -> float | None:
    """p50 of the row that has these values; the newest where several have."""
    found = [r for r in rows if all(r.get(key) == value for key, value in wanted.items())]
    return max(found, key=lambda row: row["date"])["p50"] if found else None


def short(value: float, digits: int = 2) -> str:
    """.97 for 0.97"""
    text = f"{value:.{digits}f}"
    return text.removeprefix("0") if text.startswith("0.") else text


def table(header: list[str], lines: Iterable[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def paragraph(text: str) -> str:
    return "\n\n" + textwrap.fill(text, 120)


def latest_machine(rows: Iterable[Row]) -> list[Row]:
    """The rows of the device and threads that were measured last."""
    rows = list(rows)
    if not rows:
        return []
    last = max(rows, key=lambda row: row["date"])
    return [r for r in rows if all(r.get(key) == last.get(key) for key in ("device", "threads"))]


def kernel_rows(rows: list[Row], gpu: bool) -> list[Row]:
    """Times of ops on the machine that measured `perturb` last."""
    kept = [r for r in rows if is_gpu(r) == gpu and not is_predicted(r) and r["metric"] == "time_s"]
    kept = [r for r in kept if r["case"] in NAMES or r["case"] in PAIRS]
    return latest_machine(kept)


def baseline(rows: list[Row], case: str, **wanted: Any) -> float | None:
    """Seconds of what an op replaces: torch's operators, or two calls where it fuses them."""
    for pair, fused in PAIRS.items():
        if fused == case:
            return median(rows, case=pair, **wanted)
    return median(rows, case=case, provider="torch", **wanted)


def cpu(rows: list[Row]) -> str:
    """Times on a CPU, per dtype: ours / what it replaces, and the ratio."""
    times = kernel_rows(rows, gpu=False)
    ours = [r for r in times if r["provider"] in ("cpu", "copy") and not r.get("model")]
    if not any(r["case"] == "perturb" for r in ours):
        return "No rows: `python -m bench kernels --device cpu`."
    n = max((r for r in ours if r["case"] == "perturb"), key=lambda r: r["date"])["n"]
    dtypes = [dtype for dtype in SHORT if any(r["dtype"] == dtype and r["n"] == n for r in ours)]

    def cell(case: str, dtype: str) -> str:
        seconds = median(ours, case=case, dtype=dtype, n=n)
        if seconds is None:
            return ""
        before = baseline(times, case, dtype=dtype, n=n)
        if before is None:
            return f"{seconds * 1e3:.1f} ms"
        return f"{seconds * 1e3:.1f} ms, {before / seconds:.1f}x"

    cases = ("perturb", "perturb rademacher", "update", "two-noise", "scratch", "mirror stochastic", "update scratch",
             "stats", "dot", "copy")  # fmt: skip
    lines = [[NAMES[case], *(cell(case, dtype) for dtype in dtypes)] for case in cases]
    header = f"{ours[0]['device']}, {ours[0]['threads']} threads, {n / 2**20:.0f} Mi elements"
    text = table([header, *(SHORT[dtype] for dtype in dtypes)], [line for line in lines if any(line[1:])])
    note = (
        "Medians; x: against torch's operators in the order of MeZO's code (`mean()` and `var()` alone for the "
        "statistics), for both signs against two scratches, for the fused update against update and scratch."
    )
    return text + paragraph(note + _changed(rows))


def _changed(rows: list[Row]) -> str:
    shares = latest_machine(r for r in rows if r["case"] == "changed" and not is_gpu(r))
    ours, theirs = median(shares, provider="cpu"), median(shares, provider="torch")
    if ours is None or theirs is None:
        return ""
    return f"  A pair of probes leaves {ours:.0%} of bf16 weights changed; the published order, {theirs:.1%}."


def gpu(rows: list[Row]) -> str:
    """Share of the floor's bandwidth per model, beside the target and what machine code predicts."""
    times, predicted = kernel_rows(rows, gpu=True), [r for r in rows if is_predicted(r)]
    models = [m for m in MODELS if any(r.get("model") == m for r in times)]
    measured = ["large tensors", *(MODELS[m] for m in models)] if times else []
    header = [f"share of copy bandwidth, {times[0]['device']}" if times else "not yet measured on a GPU", "target"]
    header += [*measured, "predicted, H200", "instructions/element", "registers"]

    def model_cell(case: str, dtype: str, model: str) -> str:
        found = [r for r in times if r["case"] == case and r["dtype"] == dtype and r.get("model") == model]
        ours = max((r for r in found if "share" in r and r["provider"] in ("triton", "cuda")),
                   key=lambda r: r["share"], default=None)  # fmt: skip
        if ours is None:
            return ""
        torch = median(found, provider="torch")
        return short(ours["share"]) + (f", {torch / ours['p50']:.0f}x torch" if torch else "")

    def large_cell(case: str, dtype: str) -> str:
        found = [r for r in times if r["case"] == case and r["dtype"] == dtype and r.get("tensor") and "share" in r]
        found = [r["share"] for r in found if r["bytes"] > LARGE]
        return short(min(found)) if found else ""

    def predicted_cells(case: str, dtype: str) -> list[str]:
        values = {m: median(predicted, case=case, dtype=dtype, metric=m)
                  for m in ("predicted_share", "instructions_per_element", "registers")}  # fmt: skip
        if values["predicted_share"] is None:
            return ["", "", ""]
        return [f"<= {short(values['predicted_share'])}", f"{values['instructions_per_element']:.1f}",
                f"{values['registers']:.0f}"]  # fmt: skip

    more = ("mirror", "update scratch", "update stats", "dot", "perturb rademacher", "update rademacher")
    lines = []
    for dtype, cases in (("bfloat16", (*TARGETS, *more)), ("float16", TARGETS)):
        for case in cases:
            cells = [large_cell(case, dtype), *(model_cell(case, dtype, m) for m in models)] if times else []
            cells += predicted_cells(case, dtype)
            if any(cells):
                floor = " (of read bandwidth)" if case in ("stats", "dot") else ""
                target = f">= {short(TARGETS[case])}" if case in TARGETS else ""
                lines.append([f"{NAMES[case]}{floor}, {SHORT[dtype]}", target, *cells])
    if not lines:
        return "No rows: `python -m bench kernels --device cuda`, `python -m bench sass`."
    return table(header, lines) + _gpu_notes(rows, times)


def _gpu_notes(rows: list[Row], times: list[Row]) -> str:
    text = "Predicted: from the machine code for sm_90 and the units' rates, all overlapping perfectly; not measured."
    if times:
        mine = [r for r in rows if is_gpu(r) and r["device"] == times[0]["device"]]
        copy = max((r for r in mine if r["case"] == "copy" and not r.get("tensor")), key=lambda r: r["date"])
        text += f"  Copy: {copy['bytes'] / copy['p50'] / 1e12:.2f} TB/s.  Large: tensors of 100 MB and more, the worst."
        different, distance = median(mine, case="same z"), median(mine, metric="max_abs_difference")
        if different is not None:
            text += f"  Elements in which a pass draws another z: {different:.0f}."
        if distance is not None:
            text += f"  Largest difference from the CPU's z: {distance:.1e}."
        host = median(mine, case="tiny perturb, host", provider="triton")
        if host is not None:
            text += f"  A call over a list of 291 tensors takes the host {host * 1e6:.0f} us."
    return paragraph(text)


def acceptance(rows: list[Row]) -> str:
    """Held-out loss and accuracy of the main job, medians over seeds."""
    rows = [r for r in rows if r["case"] == "acceptance"]
    if not rows:
        return "No rows: `python -m bench acceptance`."
    labels = {"mezo": "MeZO", "zo-finetuner": "ZO Fine-tuner, published llama1B nets", "adam": "Adam, first order"}

    def values(provider: str, metric: str) -> list[float]:
        return [r["p50"] for r in rows if r["provider"] == provider and r["metric"] == metric]

    def cells(numbers: list[float]) -> list[str]:
        return [short(statistics.median(numbers), 3), f"{short(min(numbers), 3)} to {short(max(numbers), 3)}"]

    first = next(iter(provider for provider in labels if values(provider, "eval_loss_before")))
    lines = [
        ["before", short(values(first, "eval_loss_before")[0], 3), "", short(values(first, "eval_metric_before")[0], 3),
         ""],
        ["always the training prior", short(values(first, "prior_loss")[0], 3), "", "", ""],
    ]  # fmt: skip
    for provider, label in labels.items():
        if not values(provider, "eval_loss_after"):
            continue
        forwards = values(provider, "forwards")[0]
        amount = f"{forwards:.0f} steps" if provider == "adam" else f"{forwards:,.0f} forwards"
        lines.append([f"{label}, {amount}", *cells(values(provider, "eval_loss_after")),
                      *cells(values(provider, "eval_metric_after"))])  # fmt: skip
    return table(["held-out rows", "loss, median", "min..max", "accuracy", "min..max"], lines)
