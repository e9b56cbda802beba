"""Rows of one's own: formats recognised from columns, files of every kind, splits, and one line for every fault."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from zo_finetuner.errors import InputError
from zo_finetuner.own.files import read_source
from zo_finetuner.own.formats import Format, check_rows
from zo_finetuner.own.splits import load_own

PAIRS = [{"prompt": f"the film number {i} was", "completion": f" good {i:03d}"} for i in range(40)]
CHAT = [{"role": "user", "content": "how was it ?"}, {"role": "assistant", "content": "good"}]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(source):
    return [row for _, row in read_source(str(source))[""].rows]


def recognised(row, columns=None):
    return check_rows([("here", row)], columns or {})[0][1]


def refused(match, *args, **more):
    with pytest.raises(InputError, match=match) as caught:
        load_own(*args, **more)
    assert "\n" not in str(caught.value)


# --- formats


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"text": "a", "label": 1}, Format("text", False)),
        ({"prompt": "a", "completion": "b", "id": "c"}, Format("prompt-completion", False)),
        ({"messages": CHAT}, Format("messages", True)),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, Format("prompt-completion", True)),
        ({"prompt": "a", "completion": None}, Format("prompt", False)),
        ({"prompt": CHAT[:1]}, Format("prompt", True)),
        ({"prompt": "a", "text": "b"}, Format("text", False)),
    ],
)
def test_formats_are_recognised_from_columns(row, format):
    assert recognised(row) == format


def test_keys_that_tables_fill_in_messages_are_taken_away():
    """A column of messages of a table gives every message all keys."""
    row = {"messages": [message | {"tool_calls": None} for message in CHAT]}
    assert check_rows([("here", row)], {})[1][0].row["messages"] == CHAT


def test_a_mapping_names_columns_and_chooses_between_formats():
    row = {"text": "a", "prompt": "b", "completion": "c", "answer": "d"}
    with pytest.raises(InputError, match="here: its columns are those of text and prompt-completion; say which"):
        recognised(row)
    assert recognised(row, {"text": "text"}) == Format("text", False)
    (_, format), checked = check_rows([("here", row)], {"completion": "answer"})
    assert format == Format("prompt-completion", False)
    assert checked[0].row == row | {"completion": "d"}


@pytest.mark.parametrize(
    ("row", "columns", "words"),
    [
        ({"sentence": "a"}, {}, r"no format has its columns \(sentence\)"),
        ({"question": "a", "answer": "b"}, {"prompt": "qestion", "completion": "answer"},
         'no column "qestion", which --columns takes as prompt .did you mean "question"'),
        ([1, 2], {}, "a row must be an object with columns, not a list"),
        ({"text": 3}, {}, '"text" is a number; it must be a text'),
        ({"text": ["a"]}, {}, '"text" is a list; it must be a text'),
        ({"text": ""}, {}, '"text" is empty: nothing to learn'),
        ({"prompt": "a", "completion": ""}, {}, '"completion" is empty'),
        ({"prompt": "a", "completion": CHAT[1:]}, {}, '"completion" is a list; it must be a text'),
        ({"prompt": CHAT[:1], "completion": "b"}, {}, '"completion" is a text; it must be a list of messages'),
        ({"messages": "hello"}, {}, '"messages" is a text; it must be a list of messages'),
        ({"messages": []}, {}, '"messages" is empty; it must be a list of messages'),
        ({"messages": [{"from": "human", "value": "a"}]}, {}, 'message 0 of "messages" .from 0. has no text "role"'),
        ({"messages": [CHAT[0], {"role": "assistant", "content": 3}]}, {}, 'message 1 of .* has no text "content"'),
        ({"messages": CHAT[:1]}, {}, '"messages" has no message of role "assistant": nothing to learn'),
    ],
)  # fmt: skip
def test_faults_of_a_row(row, columns, words):
    with pytest.raises(InputError, match=f"^here: {words}"):
        recognised(row, columns)


def test_mixed_formats_name_both_rows(tmp_path):
    path = lines(tmp_path / "a.jsonl", [PAIRS[0], {"text": "x"}, *PAIRS])
    refused(r"a.jsonl:2: is text, but .*a.jsonl:1 is prompt-completion; all rows must have one format", path)
    path = lines(tmp_path / "b.jsonl", [{"text": "x"}, {"id": 3}])
    refused(r"b.jsonl:2: has no text, but .*b.jsonl:1 is text", path)
    path = lines(tmp_path / "c.jsonl", [*PAIRS, {"prompt": CHAT[:1], "completion": CHAT[1:]}])
    refused(r"c.jsonl:41: is conversational prompt-completion, but .*c.jsonl:1 is prompt-completion", path)
    other = lines(tmp_path / "d.jsonl", [{"text": "x"}])
    refused(r"d.jsonl:1: is text, but .*p.jsonl:1 is prompt-completion", lines(tmp_path / "p.jsonl", PAIRS), other)


def test_a_prompt_without_completion_needs_an_objective(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"prompt": str(i)} for i in range(5)])
    refused("a.jsonl:1: has a prompt but no completion, which only an --objective can do without", path)
    assert load_own(path, prompts=True)[1] == Format("prompt", False)


# --- files


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [PAIRS[0], {"prompt": 'he said "a,\nb"', "completion": "007"}]
    lines(tmp_path / "a.jsonl", rows)
    lines(tmp_path / "lines.json", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    quoted = [",".join('"' + row[name].replace('"', '""') + '"' for name in row) for row in rows]
    (tmp_path / "a.csv").write_text("\ufeffprompt,completion\r\n" + "\r\n".join(quoted) + "\r\n", newline="")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "lines.json", "a.json", "a.csv", "a.parquet"):
        assert read(tmp_path / name) == rows, name


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b"\n', "a.jsonl:3: not JSON"),
        ("a.jsonl", "\n \n", "a.jsonl: no rows"),
        ("a.json", "[]", "a.json: no rows"),
        ("a.json", '[{"text": "a"}, {"text" "b"}]', "a.json: not JSON at column"),
        ("a.csv", "text\n", "a.csv: no rows"),
        ("a.csv", "prompt,completion\na,b\na,b,c\n", "a.csv:3: has 3 fields, the header has 2"),
        ("a.csv", 'prompt,completion\na,"b\n', "a.csv:3: not CSV|a.csv:2: not CSV"),
        ("a.csv", "a,a\n1,2\n", 'a.csv:1: column "a" stands twice'),
        ("a.parquet", "PAR1 no", "a.parquet: is no Parquet file"),
        ("a.txt", "hello", r"a.txt: must end in .jsonl, .json, .csv, .parquet"),
    ],
)
def test_broken_files(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    refused(words, str(tmp_path / name))


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    refused("a.jsonl:2: byte 11 .0xff. is not UTF-8", str(tmp_path / "a.jsonl"))
    refused("none.jsonl: no such file", str(tmp_path / "none.jsonl"))
    refused("none: no such file or folder", str(tmp_path / "none"))


def test_a_folder_of_splits(tmp_path):
    for name, first in (("train-00000-of-00002", 0), ("train-00001-of-00002", 10), ("validation", 20), ("test", 30)):
        lines(tmp_path / f"{name}.jsonl", PAIRS[first : first + 10])
    (tmp_path / "README.md").write_text("mine")
    splits, _ = load_own(str(tmp_path), num_eval=4)
    assert sorted(row["prompt"] for _, row in splits.train) == sorted(row["prompt"] for row in PAIRS[:20])
    assert {row["prompt"] for _, row in splits.dev} == {row["prompt"] for row in PAIRS[20:30]}
    assert len(splits.test) == 4 and splits.origin["test"].endswith("test.jsonl")
    assert splits.train[0].place.startswith(str(tmp_path / "train-0000"))

    lines(tmp_path / "test.json", PAIRS)
    refused("test.json and test.jsonl are the same split; keep one", str(tmp_path))
    (tmp_path / "empty").mkdir()
    lines(tmp_path / "empty" / "data.jsonl", PAIRS)
    refused("holds no train, validation or test file .* but data.jsonl", str(tmp_path / "empty"))
    (tmp_path / "late").mkdir()
    lines(tmp_path / "late" / "test.jsonl", PAIRS)
    refused("late: has no train split but test", str(tmp_path / "late"))


def test_the_hub_and_its_faults(monkeypatch):
    asked = []

    def load(name, config):
        asked.append((name, config))
        if name == "offline":
            raise ConnectionError("Couldn't reach the Hub\nlong story")
        return {"train": PAIRS[:30], "validation": PAIRS[30:]} if name == "me/mine" else {"all": PAIRS}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    splits, _ = load_own("me/mine:small")
    assert asked == [("me/mine", "small")]
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (27, 10, 3)
    assert splits.origin["dev"] == "me/mine:small, split validation"
    refused("offline: no such file or folder, and the Hub gave: Couldn't reach the Hub$", "offline")
    refused("me/other: has no split named train, validation or test but all", "me/other")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("me/mine: reading it needs `pip install datasets`", "me/mine")


def test_a_dataset_saved_by_the_package(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": [{"role": "user", "content": str(i)}, CHAT[1]]} for i in range(6)]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "saved"))
    splits, format = load_own(str(tmp_path / "saved"))
    assert format == Format("messages", True) and splits.train[0].row["messages"][1] == CHAT[1]


# --- splits


def test_what_is_held_out_does_not_depend_on_what_is_trained_on(tmp_path):
    path = lines(tmp_path / "a.jsonl", PAIRS)
    splits, _ = load_own(path, seed=3)
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (32, 4, 4)
    everything = [row.place for split in (splits.train, splits.dev, splits.test) for row in split]
    assert len(set(everything)) == 40
    few, _ = load_own(path, seed=3, num_train=5)
    assert (few.dev, few.test, few.train) == (splits.dev, splits.test, splits.train[:5])
    other, _ = load_own(path, seed=4)
    assert other.test != splits.test
    assert [row for _, row in splits.test] == [PAIRS[i] for i in splits.index["test"]]


def test_given_splits_are_taken_whole(tmp_path):
    files = [lines(tmp_path / f"{i}.jsonl", PAIRS[i : i + 10]) for i in (0, 10, 20)]
    splits, _ = load_own(*files)
    assert [len(rows) for rows in (splits.train, splits.dev, splits.test)] == [10, 10, 10]
    splits, _ = load_own(None, None, files[2], num_eval=3)
    assert not splits.train and len(splits.test) == 3


def test_rows_that_are_held_out_and_trained_on_are_told(tmp_path):
    path = lines(tmp_path / "a.jsonl", PAIRS)
    with pytest.warns(UserWarning, match="10 of 10 test rows are training rows too"):
        load_own(path, test_data=lines(tmp_path / "t.jsonl", PAIRS[:10]), dev_data=lines(tmp_path / "d.jsonl", [
            {"prompt": "a", "completion": "b"}]))


def test_sizes_that_do_not_fit(tmp_path):
    path = lines(tmp_path / "a.jsonl", PAIRS[:10])
    refused("10 rows are too few to hold out 10 and train on the rest", path, num_dev=6, num_eval=4)
    refused("2 rows are too few to hold out 2", lines(tmp_path / "b.jsonl", PAIRS[:2]))
    refused("0 dev rows were asked for", path, num_dev=0)
    refused("data seed -1 is out of range", path, seed=-1)
    refused('--columns text2=...: no such column .did you mean "text"', path, columns={"text2": "a"})
    with pytest.warns(UserWarning, match="8 rows are left to train on, 9 were asked for"):
        load_own(path, num_train=9)


def test_examples_of_the_documentation_are_recognised():
    text = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    rows = [json.loads(line) for line in text.split("```json\n")[1].split("```")[0].splitlines()]
    assert [str(recognised(row)) for row in rows] == [
        "text", "prompt-completion", "conversational prompt-completion", "messages", "prompt",
    ]  # fmt: skip
