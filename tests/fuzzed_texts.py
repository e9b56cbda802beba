"""Files of text that are fuzzed: settings, rows of tasks and of one's own, documents."""

from __future__ import annotations

import io
import json
import lzma
from functools import lru_cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from mutations import edited, encoded, mangled, places, sometimes_mangled

from zo_finetuner.data import load_splits
from zo_finetuner.learning.text import read_documents
from zo_finetuner.own.splits import load_own
from zo_finetuner.tasks import get_task

SETTINGS = {
    "model": "a/b", "task": "sst2", "data": "rows", "output_dir": "out", "optimizer": "zo-adam", "set": {"beta1": 0.8},
    "steps": 20, "lr": 1e-6, "eps": 1e-3, "seed": 3, "resume": False, "pertnn": None, "dtype": "auto",
}  # fmt: skip
YAML = ["&a ", "*a", "<<: *a", "!!python/object/apply:os.system [id]", "!!timestamp x", "!!int ''", "!!bool x", "? ",
        "- ", "2001-99-99", "0o9", "1:99:99", "!!binary x", "|\n", ">\n", "---\n", "...\n", "%YAML 9.9\n", "{" * 2000,
        "\t", "\0",
        "[*a, *a]", "0x", "\"\\ud800\"", "lr: .inf\n", "lr: .nan\n", "steps: 1e400\n", "set: [1]\n", "x: 1\n", "1: 2\n",
        "~: 1\n", "steps: 7\n", "? [a]\n: 1\n", "_: -\n", "=", "@", "`", "#"]  # fmt: skip


@st.composite
def yaml_like(draw: Any) -> bytes:
    """Settings in flow style (JSON, edited) or in lines, with what is peculiar to YAML put in."""
    if draw(st.booleans()):
        text = draw(edited(SETTINGS))
    else:
        text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in SETTINGS.items() if draw(st.integers(0, 5)))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(places(len(text)))
        if draw(st.booleans()):
            at = text.rfind("\n", 0, at) + 1  # the start of a line
        text = text[:at] + draw(st.sampled_from(YAML)) + text[at:]
    return encoded(text)


ROWS = {
    "sst2": {"sentence": "a fine film", "label": 1},
    "copa": {"premise": "P.", "choice1": "A b.", "choice2": "C d.", "question": "cause", "label": 0},
    "record": {"passage": "p", "query": "@placeholder won", "entities": ["A", "B"], "answers": ["B"]},
    "squad": {"title": "t", "context": "c", "question": "q", "answers": {"text": ["a"]}},
}


@st.composite
def lines_like(draw: Any, row: Any) -> bytes:
    """Three rows in JSON lines, one of them edited."""
    whole, at = json.dumps(row), draw(st.integers(0, 2))
    broken = draw(edited(row))
    return encoded("".join(f"{broken if i == at else whole}\n" for i in range(3)))


@st.composite
def row_files(draw: Any) -> dict[str, bytes]:
    task = draw(st.sampled_from(sorted(ROWS)))
    rows = draw(sometimes_mangled(lines_like(ROWS[task])))
    return {"train.jsonl": rows, "validation.jsonl": encoded(json.dumps(ROWS[task])), "task": task.encode()}


def read_rows(folder: Path) -> None:
    task = get_task((folder / "task").read_text())
    splits = load_splits(task, folder, num_train=2, num_dev=1)
    for row in splits.train + splits.dev + splits.test:
        [(task.prompt(row) + option).encode() for option in task.candidates(row)]


LINES = lzma.compress(b"one document\nanother one\n")


@st.composite
def text_files(draw: Any) -> dict[str, bytes]:
    """One of three kinds is broken, the others are empty."""
    files = {"a.txt": b"", "b.txt.xz": LINES, "c.jsonl": b""}
    name = draw(st.sampled_from(sorted(files)))
    made = {"a.txt": st.just(b"one document\nanother one\n") | st.binary(max_size=40),
            "b.txt.xz": st.just(LINES), "c.jsonl": lines_like({"text": "one document"})}[name]  # fmt: skip
    return files | {name: draw(mangled(draw(made)) if name == "b.txt.xz" else sometimes_mangled(made))}


OWN = [{"prompt": "is it good?", "completion": "yes", "n": 1}, {"prompt": "is it?", "completion": "no", "n": 2}] * 2
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@lru_cache
def parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    made = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(OWN), made)
    return made.getvalue()


@st.composite
def own_files(draw: Any) -> dict[str, bytes]:
    """A user's rows, in one of the four kinds of files; the other files are whole."""
    table = 'prompt,completion\n"is it, really?",yes\nis it?,no\na,b\n'
    files = {"x.csv": table.encode(), "x.json": encoded(json.dumps(OWN)), "x.parquet": parquet(),
             "x.jsonl": encoded(json.dumps(OWN[0])), "kind": b""}  # fmt: skip
    name = draw(st.sampled_from(("x.csv", "x.json", "x.parquet", "x.jsonl")))
    broken = {"x.csv": mangled(files["x.csv"]), "x.parquet": mangled(files["x.parquet"]) | st.just(files["x.parquet"]),
              "x.json": sometimes_mangled(edited(OWN).map(encoded)),
              "x.jsonl": sometimes_mangled(lines_like(CHAT) | lines_like(OWN[0]))}  # fmt: skip
    return files | {name: draw(broken[name]), "kind": name.encode()}


def read_own(folder: Path) -> None:
    splits, _ = load_own(str(folder / (folder / "kind").read_text()), num_dev=1, num_eval=1)
    for place, row in splits.train + splits.dev + splits.test:
        assert str(folder) in place and repr(row)


def read_texts(folder: Path) -> None:
    for document in read_documents(folder):
        document.encode()
