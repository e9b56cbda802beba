"""The code in docs/ runs as it stands: the blocks of a page one after the other, in a folder that holds `my-model`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from models import save_model

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.parametrize("page", ["trainers.md", "adapters.md"])
def test_code_of_a_page(page, tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl")
    save_model(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= 2
    names: dict = {}
    for block in blocks:
        exec(compile(block, f"docs/{page}", "exec"), names)
    optimizer = names["trainer"].zo_optimizer if "trainer" in names else names["optimizer"]
    assert optimizer.engine.step_count == 2
