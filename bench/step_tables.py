"""Rows of whole steps -> tables: what was measured, and on a GPU against the targets, with what `zo plan` predicts
where nothing was measured."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from bench.tables import MODELS, SHORT, Row, is_gpu, is_predicted, latest_machine, median, paragraph, table

NAMES = {"mezo": "MeZO", "zo-finetuner": "ZO Fine-tuner"}
KEY = ("device", "threads", "model", "dtype", "task", "n", "filled")
FILLED = 4096  # tokens of the batch that has a target

Get = Callable[..., float | None]


def step(rows: list[Row]) -> str:
    rows = [r for r in rows if not r.get("shrink")]
    steps = [r for r in rows if r["case"] == "step"]
    measured = _measured(steps) if steps else "No rows: `python -m bench step`."
    planned = [r for r in rows if r["case"] == "plan" and is_predicted(r)]
    trained = [r for r in rows if r["case"] == "train" and is_gpu(r)]
    targets = _targets(latest_machine(r for r in steps if is_gpu(r)), planned, latest_machine(trained))
    return measured + "\n\n" + targets


def headline(rows: list[Row]) -> str:
    """The README's first table: steps on the machine measured last."""
    steps = latest_machine(r for r in rows if r["case"] == "step" and not r.get("shrink"))
    if not steps:
        return "No rows: `python -m bench step`."
    where = steps[0]["device"] + (f", {steps[0]['threads']} threads" if steps[0]["threads"] else "")
    lines = []
    for wanted in _measurements(steps):
        get = _getter(steps, **wanted)
        batch = f"batch {wanted['n']}" if wanted["filled"] is None else f"{wanted['filled']:,} tokens"
        lines.append([
            f"{wanted['model']}, {SHORT[wanted['dtype']]}, {wanted['task']}, {batch}",
            _speed(get("zo_finetuner"), None),
            _times(_over(get("mezo_reference"), get("zo_finetuner"))),
            _times(_over(get("zo_finetuner"), get("inference"))),
            _times(_over(get("zo_finetuner", "peak_bytes"), get("inference", "peak_bytes")), 3),
        ])  # fmt: skip
    return table([where, "a step", "faster than MeZO's order", "over two bare forwards", "peak memory over inference"],
                 lines)  # fmt: skip


def _measurements(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What was measured, in the order of the rows."""
    keys = dict.fromkeys(tuple(map(r.get, KEY)) for r in rows)
    return [dict(zip(KEY, key, strict=True)) for key in keys]


def _times(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}x"


def _over(top: float | None, bottom: float | None) -> float | None:
    return top / bottom if top is not None and bottom else None


def _speed(seconds: float | None, tokens: float | None) -> str:
    """The time of a step, steps and tokens in a second."""
    if seconds is None:
        return ""
    text = f"{seconds * 1e3:.1f} ms, {1 / seconds:.1f} steps/s"
    return text if tokens is None else f"{text}, {tokens / seconds:,.0f} tokens/s"


def _peak(get: Get, provider: str = "zo_finetuner") -> str:
    """Measured over inference, and what `zo plan` says."""
    ratios = [_over(get(provider, metric), get("inference", metric)) for metric in ("peak_bytes", "planned_bytes")]
    measured, planned = (_times(ratio, 3) for ratio in ratios)
    return f"{measured} (plan {planned})" if measured and planned else measured


def _parts(get: Get) -> str:
    """Faster than MeZO's order, and how much of it is kernels, how much work not done."""
    ours, noise, mezo = (get(name) for name in ("zo_finetuner", "reference_noise", "mezo_reference"))
    whole = _times(_over(mezo, ours))
    if whole and noise is not None:
        whole += f" = {noise / ours:.2f} kernels * {mezo / noise:.2f} work"
    return whole


def _getter(rows: Sequence[Row], **wanted: Any) -> Get:
    return lambda provider, metric="time_s": median(rows, provider=provider, metric=metric, **wanted)


def _measured(rows: list[Row]) -> str:
    lines = []
    for wanted in _measurements(rows):
        get = _getter(rows, **wanted)
        batch = f"batch {wanted['n']}" if wanted["filled"] is None else f"{wanted['filled']:,} tokens"
        where = wanted["device"] + (f", {wanted['threads']} threads" if wanted["threads"] else "")
        tokens = next(r["tokens"] for r in rows if all(r.get(k) == v for k, v in wanted.items()))
        lines.append([
            f"{wanted['model']}, {SHORT[wanted['dtype']]}, {wanted['task']}, {batch}, {where}",
            _speed(get("zo_finetuner"), tokens),
            _times(_over(get("zo_finetuner"), get("inference"))),
            _times(_over(get("zo_finetuner_lozo"), get("inference"))),
            _peak(get),
            _peak(get, "zo_finetuner_lozo"),
            _parts(get),
            _times(_over(get("zo_finetuner_reference"), get("zo_finetuner_learned"))),
        ])  # fmt: skip
    text = table(["whole step", "ours", "two bare forwards", "the same, low rank (LOZO)", "peak over inference",
                  "LOZO's peak", "faster than MeZO's order", "with nets, than the ZO Fine-tuner's"], lines)  # fmt: skip
    return text + paragraph(
        "Work: candidates that share a prompt, padding, and logits that are never read.  Peak: of tensors, weights "
        "included; where the column is empty it was not measured."
    )


def _targets(steps: list[Row], planned: list[Row], trained: list[Row]) -> str:
    """A line per number that has a target on a GPU, a column per model."""
    gpu = steps[0]["device"] if steps else trained[0]["device"] if trained else ""
    named = "H100" if "H100" in gpu else "H200"
    planned = [r for r in planned if r["device"].startswith(named)]
    if not (steps or planned or trained):
        return "No rows: `bench/gpu.sh step OUT` on a GPU, `python -m bench plan`."
    models = {m: (functools.partial(_getter, [r for r in steps if r["model"] == m]),
                  functools.partial(_getter, [r for r in planned if r["model"] == m])) for m in MODELS}  # fmt: skip

    def line(title: str, target: str, number: Callable[[Get], str], predicted: bool = True, **batch: Any) -> list[str]:
        cells = []
        for measure, plan in models.values():
            guess = number(plan(**batch)) if predicted else ""
            cells.append(number(measure(**batch)) or (f"predicted {guess}" if guess else "not measured"))
        return [title, target, *cells]

    def ratio(top: str, bottom: str, metric: str = "time_s", digits: int = 2) -> Callable[[Get], str]:
        return lambda get: _times(_over(get(top, metric), get(bottom, metric)), digits)

    def seconds(get: Get) -> str:
        value = get("zo_finetuner")
        return "" if value is None else f"{value * 1e3:.1f} ms, {1 / value:.1f} steps/s"

    sst2, filled = {"task": "sst2", "n": 16}, {"filled": FILLED}
    lines = [
        line("SST-2, 16 rows: a step", "", seconds, **sst2),
        line("over two bare forwards", "<= 2.2", ratio("zo_finetuner", "inference"), **sst2),
        line("the same, both as CUDA graphs", "<= 2.2", ratio("zo_finetuner_graph", "inference_graph"), False, **sst2),
        line("low rank (LOZO), over two bare forwards", "<= 1.05", ratio("zo_finetuner_lozo", "inference"), False,
             **sst2),
        line("faster than MeZO's order", ">= 5x / 5x / 4x", _parts, False, **sst2),
        line("with nets, than the ZO Fine-tuner's", ">= 8x at 1B",
             ratio("zo_finetuner_reference", "zo_finetuner_learned"), False, **sst2),
        line("peak over inference", "<= 1.05x at 1B, 1.02x at 30B", ratio("zo_finetuner", "inference", "peak_bytes", 3),
             **sst2),
        line("4,096 tokens: a step", "", seconds, **filled),
        line("over two bare forwards", "<= 1.20 / 1.12 / 1.12", ratio("zo_finetuner", "inference"), **filled),
        line("the same, both as CUDA graphs", "<= 1.20 / 1.12 / 1.12", ratio("zo_finetuner_graph", "inference_graph"),
             False, **filled),
        *(_trained(trained, provider, name) for provider, name in
          (("zo_finetuner", "MeZO"), ("zo_finetuner_learned", "ZO Fine-tuner"))),
    ]  # fmt: skip
    where = f"{gpu}, bf16, random weights" if gpu else "not yet measured on a GPU"
    text = table([where, "target", *MODELS.values()], lines)
    return text + paragraph(
        f"Predicted: by `zo plan` for an {named}, from datasheet rates and without launches; not measured.  Models "
        f"have the shapes of Llama-3.2-1B, Llama-3.1-8B and OPT-30B."
    )


def _trained(rows: list[Row], provider: str, name: str) -> list[str]:
    cells = []
    for model in MODELS:
        get = _getter(rows, model=model)
        seconds = get(provider)
        peak = _over(get(provider, "training_peak_bytes"), get(provider, "evaluation_peak_bytes"))
        cells.append("not measured" if seconds is None else
                     f"{seconds * 1e3:.1f} ms" + (f", peak {peak:.3f}x evaluation's" if peak else ""))  # fmt: skip
    return [f"`zo train`, {name}: a step", "", *cells]
