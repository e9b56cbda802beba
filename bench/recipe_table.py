"""Rows of `python -m bench recipes` -> the table of docs/recipes.md."""

from __future__ import annotations

from bench.recipes import DEVICE, ROWS, TOKENS, recipes
from bench.tables import SHORT, Row, median, paragraph, table
from zo_finetuner.config import RunConfig


def table_of(rows: list[Row]) -> str:
    """A line per recipe: what it trains, what `zo plan` predicts, and what was run for real."""
    mine = [r for r in rows if r["case"] == "recipes"]
    if not mine:
        return "No rows: `python -m bench recipes`."
    lines = []
    for name, recipe in recipes().items():
        own = [r for r in mine if r["provider"] == name]
        seconds, peak, inference, adam = (median(own, metric=metric) for metric in
                                          ("time_s", "peak_bytes", "inference_bytes", "adam_bytes"))  # fmt: skip
        lines.append([
            f"[{name}](../recipes/{name}.yaml)",
            f"{recipe.model.split('/')[-1]}, {trained(recipe)}",
            recipe.task or "your rows",
            f"{recipe.optimizer}, {recipe.steps:,} steps, lr {recipe.lr:g}, eps {recipe.eps:g}",
            *(f"{value / 2**30:.1f} GiB" if value else "" for value in (peak, inference, adam)),
            f"{seconds * 1e3:.0f} ms" if seconds else "",
            tried(own),
        ])  # fmt: skip
    return table(["recipe", "model, trained", "task", "settings", "peak, predicted", "inference", "Adam, first order",
                  f"a step on an {DEVICE}, predicted", "run for real"], lines) + paragraph(
        f"Predicted by `zo plan` for {ROWS} rows of {TOKENS} tokens, steps as CUDA graphs; nothing of it was measured, "
        f"and no recipe has run on its own model.  Prefix: inference, with less than a megabyte of its own.  A "
        f"base in int8 by torchao's layout, whose products copy a layer's weight into 16 bits, and whose first order "
        f"keeps these copies.  Your rows: answers of 16 tokens.  Run for real: the same settings but for the model, "
        f"the rows and the number of steps."
    )  # fmt: skip


def trained(recipe: RunConfig) -> str:
    """`all weights, bf16`"""
    what = {None: "all weights", "lora": f"LoRA of rank {recipe.lora_rank or 8}",
            "prefix": f"prefix of {recipe.virtual_tokens or 5}"}[recipe.adapter]  # fmt: skip
    return f"{what}, base in {recipe.quantize}" if recipe.quantize else f"{what}, {SHORT[recipe.dtype]}"


def tried(rows: list[Row]) -> str:
    found = [r for r in rows if r["metric"] == "tried_step_s"]
    if not found:
        return "no"
    newest = max(found, key=lambda row: row["date"])
    return f"{newest['steps']} steps on {newest['on']}, CPU"
