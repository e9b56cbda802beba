"""`python -m bench report`: the newest row of each key -> the README's tables, and the pictures in results.

A table stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->` (NAMEs: `TABLES`), and is replaced as a
whole; what has no markers is not written.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from bench import tables
from bench.methods import picture as methods_picture
from bench.methods.table import table as methods
from bench.quality import picture as quality_picture
from bench.quality.verdict import table as quality
from bench.rows import newest, read
from bench.step_tables import step
from bench.tables import Row

TABLES: dict[str, Callable[[list[Row]], str]] = {
    "cpu": tables.cpu, "gpu": tables.gpu, "step": step, "acceptance": tables.acceptance, "quality": quality,
    "methods": methods,
}  # fmt: skip
OPEN = re.compile(r"<!-- bench:([\w-]*) -->")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=Path("bench/results"), help="folder of the rows")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the tables differ")


def fill(text: str, rows: list[Row]) -> str:
    """The text with every marked table made anew.  ValueError naming a marker that has no table or no end."""
    for name in OPEN.findall(text):
        if name not in TABLES:
            raise ValueError(f"there is no table for <!-- bench:{name} -->; there are: {', '.join(TABLES)}")
        block = re.compile(rf"(<!-- bench:{name} -->\n)(?:(?!<!-- bench:).)*?(<!-- /bench:{name} -->)", re.DOTALL)
        if not block.search(text):
            raise ValueError(f"<!-- bench:{name} --> has no <!-- /bench:{name} --> after it")
        made = TABLES[name](rows)
        text = block.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)
    return text


def run(arguments: argparse.Namespace) -> int:
    """0; 1 when `--check` finds other tables, or when a marker or a file is wrong."""
    if not arguments.results.is_dir():
        print(f"report: there is no folder {arguments.results}", file=sys.stderr)
        return 1
    rows = newest(read(arguments.results))
    try:
        before = arguments.readme.read_text(encoding="utf-8")
        after = fill(before, rows)
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    if arguments.check:
        if before != after:
            print(f"report: the tables of {arguments.readme} are not those of {arguments.results}: "
                  f"python -m bench report", file=sys.stderr)  # fmt: skip
        return int(before != after)
    if before != after:
        arguments.readme.write_text(after, encoding="utf-8")
    from bench import picture, step_picture

    picture.draw(rows, arguments.results / "kernels.png")
    step_picture.draw(rows, arguments.results / "step.png")
    quality_picture.draw(rows, arguments.results / "quality.png")
    methods_picture.draw(rows, arguments.results / "methods.png")
    state = "written" if before != after else "as it was"
    print(f"{arguments.readme}: {state}; kernels.png, step.png, quality.png and methods.png in {arguments.results}")
    return 0
