"""README.md and docs/: links lead somewhere, the tree names what is there, and settings of commands are known."""

from __future__ import annotations

import re
import shlex

import pytest
from conftest import ROOT

from bench.report import pages
from zo_finetuner.cli import _parser

PAGES = pages(ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:|#", link)]
    assert not [link for link in links if not (page.parent / link.partition("#")[0]).exists()]


def test_the_trees_files_are_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text[text.index("## The tree") :]
    folder, missing = ROOT, []
    for line in re.findall(r"^(?:\w+/)+ .*|^  \S.*", tree, re.M):
        if not line.startswith(" "):
            folder = ROOT / line.split()[0]
        for name in re.match(r"\s*((?:[\w/]+(?:\.py|\.h|/) ?)*)", line)[1].split():
            if not ((ROOT if not line.startswith(" ") else folder) / name).exists():
                missing.append(f"{folder.name}: {name}")
    assert not missing


def commands(text: str) -> list[str]:
    """Lines of shell that call `zo`, continued lines put together, without comments and what stands for more."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\s+#.*|; done.*", "", line.split("do ")[-1])
            if line.startswith("zo ") and "..." not in line:
                found.append(line)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_flags_that_exist(page):
    for command in commands(page.read_text(encoding="utf-8")):
        _parser().parse_args(shlex.split(command)[1:])
