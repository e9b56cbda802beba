"""Rows of benchmarks, and the tables and the picture that a report makes of them."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT

from bench import report, rows
from bench.__main__ import main

COMMON = {
    "dtype": "bfloat16", "n": 1 << 24, "metric": "time_s", "unit": "s", "p20": 0.9e-3, "p50": 1e-3, "p80": 2e-3,
    "repeats": 21, "device": "Big CPU, 2 cores", "threads": 2, "driver": "", "torch": "2", "triton": "3", "python": "3",
    "commit": "abc", "dirty": False, "date": "2026-11-23T10:00:00+00:00",
}  # fmt: skip
GPU = COMMON | {"device": "Large GPU", "driver": "580.1", "model": "llama-8b", "bytes": 1 << 26}
PREDICTED = COMMON | {"device": "sm_90 (predicted)", "provider": "triton", "unit": ""}
README = "# Title\n<!-- bench:cpu -->\n<!-- /bench:cpu -->\ntext\n<!-- bench:gpu -->\nold\n<!-- /bench:gpu -->\nend\n"


def row(case: str, provider: str, seconds: float = 1e-3, base: dict = COMMON, **more) -> dict:
    return base | {"case": case, "provider": provider, "p50": seconds, "p20": seconds, "p80": seconds} | more


@pytest.fixture
def folder(tmp_path):
    """A results folder and a README."""
    add(tmp_path, row("perturb", "cpu", 0.010), row("perturb", "torch", 0.088), row("copy", "copy", 0.005))
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def add(folder, *new: dict) -> None:
    for one in new:
        rows.append(folder / "results" / "kernels.jsonl", one)


def run(folder, *words: str) -> int:
    return main(["report", "--results", str(folder / "results"), "--pages", str(folder / "README.md"), *words])


@pytest.mark.parametrize("key", rows.REQUIRED)
def test_a_row_that_lacks_a_key_is_refused(tmp_path, key):
    whole = row("perturb", "cpu")
    rows.append(tmp_path / "rows.jsonl", whole)
    with pytest.raises(ValueError, match=f"lacks '{key}'"):
        rows.append(tmp_path / "rows.jsonl", {k: v for k, v in whole.items() if k != key})
    assert rows.read(tmp_path / "rows.jsonl") == [whole]


@pytest.mark.parametrize(("key", "value"), [("p50", float("nan")), ("p20", "fast"), ("n", 1.5), ("commit", None)])
def test_a_row_with_no_such_value_is_refused(tmp_path, key, value):
    with pytest.raises(ValueError, match=f"'{key}' of a row of case 'perturb' is .*, not a"):
        rows.append(tmp_path / "rows.jsonl", row("perturb", "cpu") | {key: value})
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_row_of_this_machine_has_every_key(tmp_path):
    row = {"case": "a", "provider": "b", "dtype": "float32", "n": 1, "metric": "time_s", "unit": "s"}
    rows.append(tmp_path / "rows.jsonl", row | rows.spread([3.0, 1.0, 2.0]) | rows.machine("cpu"))
    (read,) = rows.read(tmp_path)
    assert read["p50"] == 2.0 and read["repeats"] == 3 and read["driver"] == "" and "cores" in read["device"]
    assert set(rows.REQUIRED) <= set(read)


def test_a_copy_that_is_no_checkout_says_its_commit(monkeypatch):
    monkeypatch.setenv("ZO_COMMIT", "0123abc-dirty")
    rows._commit.cache_clear()
    try:
        assert {"commit": "0123abc", "dirty": True}.items() <= rows.machine("cpu").items()
        monkeypatch.delenv("ZO_COMMIT")
        monkeypatch.setattr(rows, "_output", lambda *command: "")
        rows._commit.cache_clear()
        assert {"commit": "unknown", "dirty": False}.items() <= rows.machine("cpu").items()
    finally:
        rows._commit.cache_clear()


def test_rows_of_before_the_schema_can_be_read(tmp_path):
    (tmp_path / "old.jsonl").write_text(json.dumps({"case": "acceptance", "value": 0.5, "date": "2026-11-23"}) + "\n")
    (old,) = rows.read(tmp_path)
    assert (old["p20"], old["p50"], old["p80"]) == (0.5, 0.5, 0.5)
    assert len(rows.newest(rows.read(ROOT / "bench" / "results"))) > 50


def test_the_newest_row_of_a_key_counts():
    first, second = row("perturb", "cpu", 1.0), row("perturb", "cpu", 2.0, date="2026-11-22")
    assert rows.newest([first, second]) == [first]
    assert rows.newest([first, second | {"date": first["date"]}])[0]["p50"] == 2.0
    assert len(rows.newest([first, second | {"threads": 1}, first | {"model": "llama-1b"}])) == 3


def test_a_report_is_written_once(folder, capsys):
    assert run(folder, "--check") == 1
    assert "the tables of" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == README
    assert run(folder) == 0
    written = (folder / "README.md").read_text()
    assert "| perturb: `theta += eps z` | 10.0 ms, 8.8x |" in written and "old" not in written
    assert written.startswith("# Title\n") and "\ntext\n" in written and written.endswith("end\n")
    assert (folder / "results" / "kernels.png").stat().st_size > 10_000
    assert run(folder) == run(folder, "--check") == 0
    assert (folder / "README.md").read_text() == written


def test_predicted_is_told_apart_from_measured(folder):
    add(
        folder,
        row("perturb", "triton", 0.93, PREDICTED, metric="predicted_share"),
        row("perturb", "triton", 15.6, PREDICTED, metric="instructions_per_element"),
        row("perturb", "triton", 40.0, PREDICTED, metric="registers"),
    )
    assert run(folder) == 0
    written = (folder / "README.md").read_text()
    assert "| not yet measured on a GPU | target | predicted, H200 |" in written
    assert "| perturb: `theta += eps z`, bf16 | >= .95 | <= .93 | 15.6 | 40 |" in written
    add(
        folder,
        row("copy", "copy", 1e-3, GPU, model=None),
        row("perturb", "triton", 2e-3, GPU, share=0.97, floor="copy"),
        row("perturb", "torch", 30e-3, GPU),
        row("stats", "triton", 2e-3, GPU, share=0.80, floor="read"),
        row("stats", "cuda", 1e-3, GPU, share=0.92, floor="read"),
        row("scratch", "triton", 1e-3, GPU, share=0.5, tensor="small", bytes=1 << 20, model=None),
        row("scratch", "triton", 1e-3, GPU, share=0.96, tensor="large", bytes=1 << 28, model=None),
        row("same z", "triton", 0.0, GPU, metric="different_elements", model=None),
    )
    assert run(folder) == 0
    written = (folder / "README.md").read_text()
    assert "| share of copy bandwidth, Large GPU | target | large tensors | 8B | predicted, H200 |" in written
    assert "| perturb: `theta += eps z`, bf16 | >= .95 |  | .97, 15x torch | <= .93 | 15.6 | 40 |" in written
    assert "| >= .90 |  | .92 |" in written and "| scratch: `out = theta + eps z`, bf16 | >= .95 | .96 |" in written
    assert "Elements in which a pass draws another z: 0." in written
    assert "10.0 ms, 8.8x" in written  # the CPU's rows are apart from the GPU's


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- bench:tpu -->\n<!-- /bench:tpu -->\n", "no table for <!-- bench:tpu -->; there are: headline, cpu, gpu"),
        ("<!-- bench:cpu -->\n", "<!-- bench:cpu --> has no <!-- /bench:cpu --> after it"),
        ("<!-- bench:cpu -->\n<!-- bench:gpu -->\n<!-- /bench:gpu -->\n<!-- /bench:cpu -->\n", "bench:cpu --> has no"),
    ],
)
def test_a_wrong_marker_is_named_and_nothing_is_written(folder, capsys, text, message):
    (folder / "README.md").write_text(text)
    assert run(folder) == 1
    assert message in capsys.readouterr().err
    assert (folder / "README.md").read_text() == text


def test_every_table_says_which_command_fills_it(tmp_path):
    text = "".join(f"<!-- bench:{name} -->\n<!-- /bench:{name} -->\n" for name in report.TABLES)
    assert report.fill(text, []).count("No rows: `python -m bench ") == len(report.TABLES)


def test_the_tables_are_those_of_the_committed_rows():
    pages = [str(page) for page in report.pages(ROOT)]
    assert main(["report", "--check", "--results", str(ROOT / "bench" / "results"), "--pages", *pages]) == 0


def test_every_table_stands_on_one_page():
    text = "".join(page.read_text(encoding="utf-8") for page in report.pages(ROOT))
    assert sorted(report.OPEN.findall(text)) == sorted(report.TABLES)
