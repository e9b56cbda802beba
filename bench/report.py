"""`python -m bench report`: the newest row of each key -> the tables of README.md and docs/*.md, and the pictures in
results.

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
from bench.step_tables import headline, step
from bench.tables import Row
from bench.when_tables import first_order, memory


def _recipes(rows: list[Row]) -> str:
    from bench.recipe_table import table_of  # checks recipes as `zo train` does, which takes transformers

    return table_of(rows)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "headline": headline, "cpu": tables.cpu, "gpu": tables.gpu, "step": step, "acceptance": tables.acceptance,
    "quality": quality, "methods": methods, "recipes": _recipes,
    "first-order": first_order, "memory": memory,
}  # fmt: skip
OPEN = re.compile(r"<!-- bench:([\w-]*) -->")


def pages(root: Path) -> list[Path]:
    """Where tables may stand."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=Path("bench/results"), help="folder of the rows")
    parser.add_argument("--pages", type=Path, nargs="+", default=pages(Path()), metavar="FILE",
                        help="default: README.md and docs/*.md")  # fmt: skip
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
        before = {page: page.read_text(encoding="utf-8") for page in arguments.pages}
        after = {page: fill(text, rows) for page, text in before.items()}
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    changed = [page for page in before if before[page] != after[page]]
    if arguments.check:
        for page in changed:
            print(f"report: the tables of {page} are not those of {arguments.results}: python -m bench report",
                  file=sys.stderr)  # fmt: skip
        return int(bool(changed))
    for page in changed:
        page.write_text(after[page], encoding="utf-8")
    from bench import picture, step_picture

    picture.draw(rows, arguments.results / "kernels.png")
    step_picture.draw(rows, arguments.results / "step.png")
    quality_picture.draw(rows, arguments.results / "quality.png")
    methods_picture.draw(rows, arguments.results / "methods.png")
    written = ", ".join(map(str, changed)) or "no page"
    print(f"written: {written}; kernels.png, step.png, quality.png and methods.png in {arguments.results}")
    return 0
