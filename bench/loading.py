"""Loading a checkpoint must not take a second copy of it on the host: proven from disk at 1B.

A bfloat16 checkpoint in shards is written to a temporary folder; a fresh process loads it and watches its anonymous
memory (RssAnon: what is no page of a file).  Weights that stay on the host may be in it: cast they are, in the
checkpoint's own dtype they remain pages of the mapped files.  What is left, `extra`, must be less than the largest
shard.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.folders import config, make_folder
from bench.rows import ROOT, append, machine, spread
from bench.shapes import CONFIGS

SHARD = "500MB"


@dataclass(frozen=True)
class Measured:
    """Bytes.  anonymous: most that loading added; anonymous_weights: of the weights that stay, the part in it;
    on_host: of all weights on the host; tensor: the largest one; shard: the largest file."""

    anonymous: int
    anonymous_weights: int
    on_host: int
    tensor: int
    shard: int

    @property
    def extra(self) -> int:
        return self.anonymous - self.anonymous_weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared = Path(os.environ.get("ZO_DATA", "../shared"))
    parser.add_argument("--shared", type=Path, default=shared, help="development data (models)")
    parser.add_argument("--model", default="imdb-llama-6m", help="whose tokenizer to take, and what warms a process up")
    parser.add_argument("--model-like", choices=CONFIGS, default="llama-1b", metavar="SHAPE", help=", ".join(CONFIGS))
    parser.add_argument("--shrink", type=int, default=1, help="divide its width and depth, for dry runs")
    parser.add_argument("--shard", default=SHARD, help=f"largest file (default: {SHARD})")


def run(arguments: argparse.Namespace) -> int:
    """0; 1 when loading took more than the largest shard besides the weights."""
    small = arguments.shared / "models" / arguments.model
    bad = []
    with tempfile.TemporaryDirectory() as work:
        folder = write_checkpoint(arguments.model_like, Path(work) / "model", small, arguments.shard, arguments.shrink)
        for dtype in ("bfloat16", "float32"):
            taken = measure(small, folder, dtype)
            row = {
                "case": "loading", "provider": "zo_finetuner", "dtype": dtype, "n": _numel(folder), "unit": "B",
                "model": arguments.model_like, **vars(taken),
                **({"shrink": arguments.shrink} if arguments.shrink > 1 else {}),
                **machine("cuda" if torch.cuda.is_available() else "cpu"),
            }  # fmt: skip
            append(arguments.out / "loading.jsonl", row | {"metric": "extra_bytes"} | spread([taken.extra]))
            mib = {name: f"{value / 2**20:,.0f} MiB" for name, value in (vars(taken) | {"extra": taken.extra}).items()}
            print(f"{arguments.model_like} as {dtype}: loading took {mib['anonymous']} of anonymous host memory, "
                  f"{mib['anonymous_weights']} of it weights that stay: {mib['extra']} extra; the largest shard has "
                  f"{mib['shard']}, the largest tensor {mib['tensor']}, weights on the host {mib['on_host']}",
                  flush=True)  # fmt: skip
            bad += [dtype] * (taken.extra > taken.shard)
    return 1 if bad else 0


def write_checkpoint(model: str, folder: Path, tokenizer: Path, shard: str, shrink: int = 1) -> Path:
    """A checkpoint of the shape in bfloat16, its files no larger than `shard` ("500MB") where a tensor allows it."""
    from transformers import AutoModelForCausalLM

    make_folder(model, folder, tokenizer, shrink)
    vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    built = AutoModelForCausalLM.from_config(config(model, shrink, vocabulary), dtype=torch.bfloat16)
    built.save_pretrained(folder, max_shard_size=shard)
    return folder


def _numel(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) // 2


def measure(small: Path, large: Path, dtype: str) -> Measured:
    """What `load_model(large, dtype)` takes in a fresh process that has loaded `small` before, so that what the
    libraries themselves need is there.  Linux only."""
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",  # glibc gives back what is freed
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python"), *sys.path]),
    }
    command = [sys.executable, "-m", "bench.loading", str(small), str(large), dtype]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
    return Measured(**json.loads(run.stdout.splitlines()[-1]))


def _anonymous() -> int:
    with open("/proc/self/status", encoding="utf-8") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def _main(small: str, large: str, dtype: str) -> None:
    """In the fresh process: prints a line of JSON."""
    from zo_finetuner.loading import load_model

    load_model(small, dtype)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    before = peak = _anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _anonymous())
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    model, _ = load_model(large, dtype)
    done.set()
    thread.join()
    tensors = list(model.parameters())
    on_host = sum(p.nbytes for p in tensors if p.device.type == "cpu")
    mapped = dtype in ("auto", "bfloat16")
    taken = Measured(
        anonymous=peak - before,
        anonymous_weights=0 if mapped else on_host,
        on_host=on_host,
        tensor=max(p.nbytes for p in tensors),
        shard=max(file.stat().st_size for file in Path(large).glob("*.safetensors")),
    )
    print(json.dumps(vars(taken)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
