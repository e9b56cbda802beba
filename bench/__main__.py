"""`python -m bench CASE [--out DIR] ...`: runs a case, appends rows to DIR/CASE.jsonl, prints its table."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

CASES = ("kernels", "acceptance")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the rows")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer repeats and seeds")
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="development data (models, rows, nets)")
    parser.add_argument("--provider", help="acceptance: only the runs of this method")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="where runs that resume are kept")
    arguments = parser.parse_args()
    importlib.import_module(f"bench.{arguments.case}").run(arguments)


if __name__ == "__main__":
    main()
