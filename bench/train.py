"""`zo train` itself on a model's shape with random weights drawn on the device: Trainer, task, evaluation, result.json.

What the step benchmark measures of the engine, this measures of the main job: seconds of a step as the Trainer takes
them (one evaluation of dev rows among them), and on a GPU the peak memory of training against that of evaluating as
many rows before it.  Its losses mean nothing.  No weights are written to disk.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from pathlib import Path

import torch

from bench.folders import make_folder
from bench.rows import append, machine, spread
from bench.shapes import CONFIGS
from zo_finetuner.cli import main as zo

METHODS = {"zo_finetuner": "mezo", "zo_finetuner_learned": "zo-finetuner"}  # named as providers of a step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared = Path(os.environ.get("ZO_DATA", "../shared"))
    parser.add_argument("--shared", type=Path, default=shared, help="development data (models, rows)")
    parser.add_argument("--model", default="imdb-llama-6m", help="whose tokenizer to take, under SHARED/models")
    parser.add_argument("--model-like", choices=CONFIGS, default="opt-30b", metavar="SHAPE", help=", ".join(CONFIGS))
    parser.add_argument("--shrink", type=int, default=1, help="divide its width and depth, for dry runs")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, help="default 20 (--quick: 2)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no run after it")


def run(arguments: argparse.Namespace) -> int:
    """0; 1 when a run failed."""
    if arguments.device == "cpu" and torch.cuda.is_available():
        print("train: `zo train` takes the GPU that is here: set CUDA_VISIBLE_DEVICES= for the CPU")
        return 1
    end, failed = arguments.budget and time.monotonic() + arguments.budget, []
    with tempfile.TemporaryDirectory() as work:
        tokenizer = arguments.shared / "models" / arguments.model
        folder = make_folder(arguments.model_like, Path(work) / "model", tokenizer, arguments.shrink)
        for provider, method in METHODS.items():
            if end and time.monotonic() > end:
                print(f"budget spent before {provider}")
                break
            if not _train(arguments, provider, method, folder, Path(work) / method):
                failed.append(provider)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return 1 if failed else 0


def _train(arguments: argparse.Namespace, provider: str, method: str, folder: Path, out: Path) -> bool:
    size, steps = arguments.batch_size, arguments.steps or (2 if arguments.quick else 20)
    settings = {
        "model": folder, "task": arguments.task, "data": arguments.shared / "data" / arguments.task, "output_dir": out,
        "optimizer": method, "steps": steps, "batch_size": size, "eval_batch_size": size, "lr": 1e-7,
        "num_train": 8 * size, "num_dev": size, "num_eval": size, "dtype": "bfloat16", "eval_steps": steps,
        "logging_steps": max(1, steps // 4),
    }  # fmt: skip
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    if zo(["train", "--random-weights", "--no-checkpoints", "--no-save-model", *flags]) != 0:
        return False
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    common = {
        "case": "train", "provider": provider, "dtype": "bfloat16", "n": size, "model": arguments.model_like,
        "task": arguments.task, "steps": result["steps"],
        **({"shrink": arguments.shrink} if arguments.shrink > 1 else {}), **machine(device),
    }  # fmt: skip
    path, peaks = arguments.out / "train.jsonl", result["peak_bytes"]
    seconds = result["seconds"] / result["steps"]
    append(path, common | {"metric": "time_s", "unit": "s"} | spread([seconds]))
    told = f"{arguments.model_like}, zo train, {method}: {seconds:.3f} s a step with its share of one evaluation"
    if peaks["training"]:
        for name, value in peaks.items():
            append(path, common | {"metric": f"{name}_peak_bytes", "unit": "B"} | spread([value]))
        told += (f"; peak {peaks['training'] / 2**30:.2f} GiB, "
                 f"{peaks['training'] / peaks['evaluation']:.3f}x evaluating as many rows")  # fmt: skip
    print(told, flush=True)
    return True
