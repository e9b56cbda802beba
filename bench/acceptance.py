"""The main job on real input: SST-2 on a 6M-parameter Llama, three seeds, held-out loss against always answering the
training prior, first-order Adam on the same rows beside it.

Runs resume: a run whose result.json exists is not repeated.  Rows go to acceptance.jsonl, curves to acceptance.png.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from bench.rows import append, machine, spread, version
from zo_finetuner.cli import keep_large_buffers
from zo_finetuner.config import RunConfig
from zo_finetuner.data import load_splits
from zo_finetuner.encoding import collate, context_length, encode_rows, pad_token
from zo_finetuner.evaluation import evaluate_split
from zo_finetuner.files import write_json, write_text
from zo_finetuner.loading import load_model
from zo_finetuner.objective import training_loss
from zo_finetuner.tasks import get_task
from zo_finetuner.training import train
from zo_finetuner.workload import prior_loss

# One rate for both, between two that were tried on dev rows with one seed (bench/LOG.md): not tuned per method.
# eps 1e-3, batch 16, the protocol's 1000/500/872 rows.
RATES = {"mezo": 5e-5, "zo-finetuner": 5e-5}
STEPS, ADAM_STEPS, ADAM_RATE = 2000, 300, 1e-4
NAMES = {
    "mezo": "MeZO",
    "zo-finetuner": "ZO Fine-tuner, published llama1B nets",
    "adam": "Adam (first order)",
}


# Of a run's result.json: key -> metric and unit of its row.
METRICS = {
    "eval_loss_before": ("eval_loss_before", "nats"),
    "eval_loss_after": ("eval_loss_after", "nats"),
    "eval_metric_before": ("eval_metric_before", "share"),
    "eval_metric_after": ("eval_metric_after", "share"),
    "prior_loss": ("prior_loss", "nats"),
    "seconds": ("time_s", "s"),
    "forwards": ("forwards", ""),
}
HELD_OUT = 872  # rows that a loss is the mean of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared = Path(os.environ.get("ZO_DATA", "../shared"))
    parser.add_argument("--shared", type=Path, default=shared, help="development data (models, rows, nets)")
    parser.add_argument("--provider", choices=NAMES, help="only the runs of this method")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="where runs that resume are kept")


def run(arguments: argparse.Namespace) -> int:
    if arguments.device == "cuda":
        print("acceptance: its runs are on the CPU; leave out --device cuda")
        return 1
    keep_large_buffers()
    seeds, steps = ((0,), 300) if arguments.quick else ((0, 1, 2), STEPS)
    shared, results = arguments.shared, {}
    for optimizer in [arguments.provider] if arguments.provider else NAMES:
        for seed in seeds:
            out = arguments.work / f"acceptance-{optimizer}-{seed}-{steps}"
            if not (out / "result.json").is_file():
                if optimizer == "adam":
                    _adam(shared, out, seed)
                else:
                    train(_config(shared, out, optimizer, seed, steps))
                result = json.loads((out / "result.json").read_text(encoding="utf-8"))
                common = {"case": "acceptance", "provider": optimizer, "dtype": "float32", "n": HELD_OUT, "seed": seed,
                          "steps": result["steps"], "transformers": version("transformers"), **machine("cpu")}
                for key, (metric, unit) in METRICS.items():
                    append(arguments.out / "acceptance.jsonl",
                           common | {"metric": metric, "unit": unit} | spread([result[key]]))  # fmt: skip
            results[optimizer, seed] = json.loads((out / "result.json").read_text(encoding="utf-8"))
    if not arguments.provider:
        _draw(arguments, seeds, steps)
        _print(results, seeds)
    return 0


def _config(shared: Path, out: Path, optimizer: str, seed: int, steps: int) -> RunConfig:
    return RunConfig(
        model=str(shared / "models" / "imdb-llama-6m"), task="sst2", data=str(shared / "data" / "sst2"),
        output_dir=str(out), optimizer=optimizer, steps=steps, lr=RATES[optimizer], seed=seed,
        pertnn=str(shared / "pertnn" / "llama1B_finetuner.pth") if optimizer == "zo-finetuner" else None,
        eval_steps=steps // 10, logging_steps=steps // 10, overwrite=True, save_model=False,
    )


def _adam(shared: Path, out: Path, seed: int) -> None:
    """First-order Adam, constant rate, same rows and batch; the best of its dev evaluations, as for the others."""
    task = get_task("sst2")
    rows = load_splits(task, shared / "data" / "sst2")
    model, tokenizer = load_model(str(shared / "models" / "imdb-llama-6m"))
    limit = context_length(model)
    encoded = {split: encode_rows(task, getattr(rows, split), tokenizer, limit) for split in ("train", "dev", "test")}
    optimizer = torch.optim.Adam(model.parameters(), lr=ADAM_RATE)
    generator = torch.Generator().manual_seed(seed)
    before = evaluate_split(model, task, encoded["test"], tokenizer, 32)
    history, best, order, started = [], (float("inf"), None), [], time.perf_counter()
    for step in tqdm(range(1, ADAM_STEPS + 1), desc="Adam"):
        if len(order) < 16:
            order = torch.randperm(len(encoded["train"]), generator=generator).tolist()
        batch = collate([encoded["train"][order.pop()] for _ in range(16)], pad_token(tokenizer))
        total, weight = training_loss(model, batch)
        (total / weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % (ADAM_STEPS // 10) == 0:
            dev = evaluate_split(model, task, encoded["dev"], tokenizer, 32)
            history.append({"step": step, "eval_loss": dev["loss"], "eval_accuracy": dev["accuracy"]})
            if dev["loss"] < best[0]:
                best = (dev["loss"], evaluate_split(model, task, encoded["test"], tokenizer, 32))
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in history))
    write_json(out / "result.json", {
        "steps": ADAM_STEPS, "forwards": ADAM_STEPS, "seconds": time.perf_counter() - started,
        "eval_loss_before": before["loss"], "eval_loss_after": best[1]["loss"],
        "eval_metric_before": before["accuracy"], "eval_metric_after": best[1]["accuracy"],
        "prior_loss": prior_loss(task, rows.train, rows.test), "seed": seed,
    })


def _draw(arguments: argparse.Namespace, seeds: tuple[int, ...], steps: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for optimizer, color in (("mezo", "C0"), ("zo-finetuner", "C1")):
        for seed in seeds:
            log = (arguments.work / f"acceptance-{optimizer}-{seed}-{steps}" / "log.jsonl").read_text(encoding="utf-8")
            entries = [e for e in map(json.loads, log.splitlines()) if "eval_loss" in e]
            axes.plot([2 * e["step"] for e in entries], [e["eval_loss"] for e in entries], color=color, marker=".",
                      label=NAMES[optimizer] if seed == seeds[0] else None)
    task = get_task("sst2")
    rows = load_splits(task, arguments.shared / "data" / "sst2")
    prior = prior_loss(task, rows.train, rows.dev)
    axes.axhline(prior, color="gray", linestyle="--", linewidth=1, label=f"always the training prior ({prior:.3f})")
    axes.set_xlabel("forwards")
    axes.set_ylabel("dev loss")
    axes.set_title(f"SST-2 on imdb-llama-6m, {len(seeds)} seeds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    arguments.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out / "acceptance.png", dpi=120)


def _print(results: dict[tuple[str, int], dict[str, Any]], seeds: tuple[int, ...]) -> None:
    print(f"{'SST-2, 872 held-out rows':<40}{'loss':>10}{'min..max':>18}{'accuracy':>10}{'min..max':>16}{'s':>7}")
    first = results["mezo", seeds[0]]
    print(f"{'before':<40}{first['eval_loss_before']:>10.3f}{'':>18}{first['eval_metric_before']:>10.3f}")
    print(f"{'always the training prior':<40}{first['prior_loss']:>10.3f}")
    for optimizer, name in NAMES.items():
        runs = [results[optimizer, seed] for seed in seeds]
        loss, metric = ([r[k] for r in runs] for k in ("eval_loss_after", "eval_metric_after"))
        print(f"{name:<40}{statistics.median(loss):>10.3f}{f'{min(loss):.3f}..{max(loss):.3f}':>18}"
              f"{statistics.median(metric):>10.3f}{f'{min(metric):.3f}..{max(metric):.3f}':>16}"
              f"{statistics.median(r['seconds'] for r in runs):>7.0f}")
