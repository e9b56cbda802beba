"""`python -m bench CASE [CASE ...] [options]` measures and appends rows to OUT/CASE.jsonl; `report` makes tables.

Every case has its own options (`python -m bench CASE --help`); those given go to every case named.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

# case -> (module with add_arguments(parser) and run(arguments), what it does).  Modules are imported when named.
MEASURED = {
    "kernels": ("bench.kernels", "every op against copy bandwidth and torch's operators, on the CPU or a GPU"),
    "step": ("bench.step", "a whole step against MeZO's order of operations and against bare inference"),
    "train": ("bench.train", "`zo train` itself on OPT-30B's shape: seconds of a step, memory against evaluation"),
    "loading": ("bench.loading", "host memory that loading a 1B checkpoint takes, against its largest shard"),
    "plan": ("bench.planned", "what `zo plan` predicts of a step of 1B, 8B and 30B models on an H100 and an H200"),
    "recipes": ("bench.recipes", "what `zo plan` predicts of every recipe, or a few steps of each on a small model"),
    "sass": ("bench.predict", "the Triton kernels compiled for sm_90: instructions per element, predicted share"),
    "journal": ("bench.journal", "what a journal costs a step, and how fast a run is rebuilt from it"),
    "scaling": ("bench.scaling", "data-parallel steps simulated to 1,000 workers, from measured steps and bytes"),
    "acceptance": ("bench.acceptance", "the main job on real input: SST-2 on a 6M-parameter Llama (CPU)"),
    "quality": ("bench.quality.command", "learned scales against MeZO and the honest controls, at equal forwards"),
    "methods": ("bench.methods.command", "every method of the library against MeZO, at equal forwards"),
}
CASES = MEASURED | {"report": ("bench.report", "rows -> the tables of README.md and docs/, results/*.png")}


def parse(words: list[str]) -> list[tuple[str, argparse.Namespace]]:
    """(module, its arguments) per case named; SystemExit(2) with one line for anything unknown."""
    top = argparse.ArgumentParser(
        prog="python -m bench",
        usage="python -m bench CASE [CASE ...] [options]",
        description=__doc__,
        epilog="cases: " + "; ".join(f"{name}: {text}" for name, (_, text) in CASES.items()),
    )
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    cases, options = words[:count], words[count:]
    if not cases:
        top.parse_args(options)  # --help ends here
        top.error("name a case first; there are: " + ", ".join(CASES))
    for name in cases:
        if name not in CASES:
            top.error(f"there is no case {name!r}; there are: " + ", ".join(CASES))
    parsed = []
    for name in cases:
        module, text = CASES[name]
        parser = argparse.ArgumentParser(prog=f"python -m bench {name}", description=text)
        if name in MEASURED:
            parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the rows")
            parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
            parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer repeats and seeds")
        importlib.import_module(module).add_arguments(parser)
        parsed.append((module, parser.parse_args(options)))
    return parsed


def main(words: list[str]) -> int:
    """Runs the cases in order; the exit status of the worst."""
    if words == ["--list"]:
        print("\n".join(CASES))
        return 0
    return max(sys.modules[module].run(arguments) or 0 for module, arguments in parse(words))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
