"""The recipes of `recipes/`: what `zo plan` predicts of each, and with `--try` a few real steps of each.

    python -m bench recipes                                                 memory and time on one H100, predicted
    python -m bench recipes --try MODEL_DIR --data DIR                      the settings on a small model and its rows

Models are known by their shapes (`shapes.py`): nothing is downloaded.  Of a prefix, which starts with what the
model says of real tokens, inference is predicted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from bench.folders import config as shape
from bench.rows import ROOT, append, machine, spread
from zo_finetuner.config import RunConfig, resolve
from zo_finetuner.devices import find_device
from zo_finetuner.errors import InputError
from zo_finetuner.plan import Plan, make_plan

FOLDER = ROOT / "recipes"
SHAPES = {
    "facebook/opt-125m": "opt-125m", "facebook/opt-1.3b": "opt-1.3b", "facebook/opt-30b": "opt-30b",
    "meta-llama/Llama-3.2-1B": "llama-1b", "meta-llama/Llama-3.1-8B": "llama-8b",
}  # fmt: skip
DEVICE, ROWS, TOKENS = "H100", 16, 256
STEPS = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--try", dest="tried", type=Path, metavar="MODEL", help="run them on a small model's folder")
    parser.add_argument("--data", type=Path, help="folder that holds a folder of rows per task, for --try")


def recipes() -> dict[str, RunConfig]:
    """Name -> settings, in the order of their models' sizes and then of the names.  Raises InputError."""
    found = {path.stem: resolve({"config": str(path)}) for path in sorted(FOLDER.glob("*.yaml"))}
    return dict(sorted(found.items(), key=lambda item: list(SHAPES).index(item[1].model)))


def plan_of(recipe: RunConfig) -> Plan:
    """On a folder that holds no more than the model's config."""
    adapter = recipe.make_adapter()
    with tempfile.TemporaryDirectory() as folder:
        shape(SHAPES[recipe.model]).save_pretrained(folder)
        return make_plan(
            folder, task=recipe.task or "squad", batch=ROWS, seq=TOKENS, optimizer=recipe.optimizer,
            probing=recipe.probing, dtype=recipe.dtype, settings=recipe.set, graphs=True,
            adapter=adapter if adapter and adapter.kind != "prefix" else None, quantize=recipe.quantize,
        )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Rows of every recipe; 1 where one that was tried has failed."""
    if (arguments.tried is None) != (arguments.data is None):
        print("recipes: give --try and --data together")
        return 1
    common, failed = machine("cpu"), 0
    for name, recipe in recipes().items():
        row = common | {"case": "recipes", "provider": name, "dtype": recipe.dtype, "n": ROWS, "model": recipe.model,
                        "task": recipe.task or "own rows"}  # fmt: skip
        failed += _predict(arguments.out, recipe, row) if arguments.tried is None else _try(arguments, recipe, row)
    return int(failed > 0)


def _predict(out: Path, recipe: RunConfig, row: dict) -> int:
    plan, device = plan_of(recipe), find_device(DEVICE)
    memory, prefix = plan.memory, recipe.adapter == "prefix"
    forwards, passes = plan.work.seconds(device, plan.dtype)
    row = row | {"device": f"{device.name} (predicted)"}
    del row["threads"]
    peak, step = (memory.inference, forwards) if prefix else (memory.peak, forwards + passes)
    numbers = {"peak_bytes": peak, "inference_bytes": memory.inference, "adam_bytes": 0 if prefix else memory.adam}
    append(out / "recipes.jsonl", row | {"metric": "time_s", "unit": "s"} | spread([step]))
    for metric, value in numbers.items():
        append(out / "recipes.jsonl", row | {"metric": metric, "unit": "B"} | spread([value]))
    print(f"predicted, {row['provider']}: {peak / 2**30:.2f} GiB, {step * 1e3:.0f} ms a step; Adam "
          f"{memory.adam / 2**30:.1f} GiB", flush=True)  # fmt: skip
    return 0


def _try(arguments: argparse.Namespace, recipe: RunConfig, row: dict) -> int:
    from zo_finetuner.training import train

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        data = arguments.data / recipe.task
        recipe.model, recipe.output_dir, recipe.steps = str(arguments.tried), f"{out}/run", STEPS
        recipe.num_train, recipe.num_dev, recipe.num_eval = 64, 16, 16
        recipe.data = str(data if recipe.task and data.is_dir() else _own_rows(out, arguments.data))
        recipe.task = recipe.task if data.is_dir() else ""
        if recipe.pertnn:
            recipe.pertnn = _scales(out, arguments.tried, arguments.data / "sst2")
        began = time.perf_counter()
        try:
            result = train(recipe)
        except InputError as error:
            print(f"{row['provider']}: {error}", flush=True)
            return 1
        seconds = result["seconds"] / result["steps"]
    what = {"metric": "tried_step_s", "unit": "s", "steps": STEPS, "on": arguments.tried.name}
    append(arguments.out / "recipes.jsonl", row | what | spread([seconds]))
    print(f"{row['provider']}: {STEPS} steps on {what['on']}, {time.perf_counter() - began:.0f} s", flush=True)
    return 0


def _own_rows(out: Path, data: Path) -> Path:
    """Prompts and completions made of SST-2's rows, a file as a user would have it."""
    lines = (data / "sst2" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    rows = [json.loads(line) for line in lines]
    answers = [{"prompt": f"{row['sentence'].strip()} It was", "completion": (" terrible", " great")[row["label"]]}
               for row in rows]  # fmt: skip
    (out / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers), encoding="utf-8")
    return out / "my.jsonl"


def _scales(out: Path, model: Path, data: Path) -> str:
    from zo_finetuner.learning.run import learn
    from zo_finetuner.learning.settings import LearnSettings

    learn(LearnSettings(model=str(model), output_dir=str(out / "scales"), recipe="closed-form", tasks=("sst2",),
                        data=(str(data),), num_train=64, num_held_out=16))  # fmt: skip
    return str(out / "scales" / "learned.safetensors")
