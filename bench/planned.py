"""What `zo plan` predicts of a step at the sizes that have targets: marked as predicted in every row and table.

Times are datasheet rates times the factors of `zo_finetuner.devices`, without launches: what a CUDA graph would take at
best.  SST-2's rows have 20 tokens (their mean under the benchmark's tokenizer), the filled batch 16 rows of 256.
"""

from __future__ import annotations

import argparse
import tempfile

from bench.folders import config
from bench.rows import append, machine, spread
from bench.shapes import CONFIGS
from zo_finetuner.devices import find_device
from zo_finetuner.plan import make_plan

DEVICES = ("H100", "H200")
BATCHES = ({"task": "sst2", "seq": 20}, {"task": "boolq", "seq": 256, "filled": 4096})
ROWS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-like", nargs="+", choices=CONFIGS, metavar="SHAPE", default=list(CONFIGS))
    parser.add_argument("--probing", default="auto")


def run(arguments: argparse.Namespace) -> int:
    """A row per model, batch, device and number: seconds of a step and of two forwards, bytes at the peak and of
    inference."""
    common = machine("cpu")
    del common["threads"]
    for model in arguments.model_like:
        with tempfile.TemporaryDirectory() as folder:
            config(model).save_pretrained(folder)
            for batch in BATCHES[:1] if arguments.quick else BATCHES:
                plan = make_plan(folder, task=batch["task"], batch=ROWS, seq=batch["seq"], probing=arguments.probing)
                for device in map(find_device, DEVICES):
                    forwards, passes = plan.work.seconds(device, plan.dtype)
                    row = common | {
                        "case": "plan", "device": f"{device.name} (predicted)", "dtype": "bfloat16", "n": ROWS,
                        "model": model, "task": batch["task"], "tokens": ROWS * batch["seq"],
                        **({"filled": batch["filled"]} if "filled" in batch else {}),
                        "fits": device.holds(plan.memory.peak),
                    }  # fmt: skip
                    for provider, seconds, peak in (
                        ("inference", forwards, plan.memory.inference),
                        ("zo_finetuner", forwards + passes, plan.memory.peak),
                    ):
                        row |= {"provider": provider}
                        path = arguments.out / "plan.jsonl"
                        append(path, row | {"metric": "time_s", "unit": "s"} | spread([seconds]))
                        append(path, row | {"metric": "peak_bytes", "unit": "B"} | spread([peak]))
                    print(f"predicted, {model}, {batch['task']}, {ROWS} x {batch['seq']} tokens, {device.name}: "
                          f"{(forwards + passes) * 1e3:.1f} ms a step, {1 + passes / forwards:.2f}x two forwards, "
                          f"peak {plan.memory.peak / 2**30:.2f} GiB, {plan.memory.ratio:.3f}x inference",
                          flush=True)  # fmt: skip
    return 0
