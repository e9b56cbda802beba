"""Rows on disk to splits: sampling, and every bad input that is told apart."""

from __future__ import annotations

import json
import sys
import types
import warnings

import numpy as np
import pytest

from zo_finetuner.data import load_splits
from zo_finetuner.errors import InputError
from zo_finetuner.tasks import get_task

SST2 = get_task("sst2")


def write(folder, train, validation=None):
    for split, rows in (("train", train), ("validation", validation or train)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def sentences(count):
    return [{"sentence": f"film {i}", "label": i % 2} for i in range(count)]


# --- sampling


def test_sampling_follows_the_protocol(tmp_path):
    write(tmp_path, sentences(50), sentences(20))
    splits = load_splits(SST2, tmp_path, seed=43, num_train=10, num_dev=5, num_eval=7)
    order = np.random.RandomState(43).permutation(50)
    assert splits.index["train"] == list(order[:10]) and splits.index["dev"] == list(order[10:15])
    assert splits.index["test"] == list(np.random.RandomState(43).permutation(20)[:7])
    assert [row["sentence"] for row in splits.dev] == [f"film {i}" for i in order[10:15]]
    assert splits.origin["dev"] == str(tmp_path / "train.jsonl")
    assert splits.origin["test"] == str(tmp_path / "validation.jsonl")


@pytest.mark.parametrize(
    ("rows", "train", "dev", "expected"),
    [
        (300, 1000, 100, (200, 100)),  # dev keeps its size
        (100, 1000, 500, (60, 40)),  # dev takes 2/5, never all
        (30, 4, 500, (4, 26)),  # a small train set that was asked for stays
        (1, 1000, 500, (1, 0)),
    ],
)
def test_a_small_split_says_what_it_gives(tmp_path, rows, train, dev, expected):
    write(tmp_path, sentences(rows))
    with pytest.warns(
        UserWarning, match=rf"{rows} rows are fewer than {train} train \+ {dev} dev; using"
    ) as caught:
        splits = load_splits(SST2, str(tmp_path), num_train=train, num_dev=dev)
    assert (len(splits.train), len(splits.dev)) == expected
    assert len(caught) == 1 and caught[0].filename == __file__


REAL = {
    "sst2": (1000, 500, 872),
    "cb": (150, 100, 56),
    "boolq": (1000, 500, 1000),
    "wsc": (454, 100, 104),
    "wic": (1000, 500, 638),
    "copa": (300, 100, 100),
    "record": (20, 12, 32),
    "squad": (1000, 500, 1000),
    "drop": (1000, 500, 1000),
}


@pytest.mark.parametrize("name", REAL)
def test_real_splits(shared, name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        splits = load_splits(get_task(name), shared / "data" / name)
    assert (len(splits.train), len(splits.dev), len(splits.test)) == REAL[name]
    assert len(caught) == (name == "record")  # the protocol's own sizes need no warning
    assert not set(splits.index["train"]) & set(splits.index["dev"])


# --- bad input


GOOD = {
    "sst2": {"sentence": "fine", "label": 1},
    "copa": {"premise": "P.", "choice1": "A b.", "choice2": "C d.", "question": "cause", "label": 0},
    "record": {"passage": "p", "query": "@placeholder won", "entities": ["A", "B"], "answers": ["B"]},
    "squad": {"title": "t", "context": "c", "question": "q", "answers": {"text": ["a"]}},
    "boolq": {"passage": "p", "question": "q", "label": 0},
}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sst2", {"sentence": None, "text": 1}, 'field "sentence" is null; it must be a text'),
        ("sst2", {"label": "great"}, 'field "label" is "great"; it must be 0 (terrible), 1 (great)'),
        ("sst2", {"label": 2}, 'field "label" is 2; it must be 0 (terrible), 1 (great)'),
        ("sst2", {"label": 1.0}, 'field "label" is 1.0; it must be'),
        ("sst2", {"label": -1}, 'field "label" is -1: no label; write 0 (terrible), 1 (great), or leave'),
        ("sst2", {"label": None}, 'field "label" is null: no label; write'),
        ("boolq", {"label": True}, 'field "label" is true; it must be 0 (False), 1 (True)'),
        ("copa", {"question": "why"}, 'field "question" is "why"; it must be "cause" or "effect"'),
        ("copa", {"choice2": " "}, 'field "choice2" is blank; write the sentence'),
        (
            "record",
            {"entities": "A"},
            'field "entities" is "A"; it must be a list of one or more non-blank texts',
        ),
        ("record", {"answers": []}, 'field "answers" is []; it must be a list of one or more'),
        ("record", {"answers": ["C"]}, 'no text of field "answers" is among "entities"; add'),
        ("record", {"query": "He won"}, 'field "query" holds no "@placeholder"; put it'),
        (
            "squad",
            {"answers": {"texts": ["a"]}},
            'field "answers.text" is missing; "answers" must be an object',
        ),
        ("squad", {"answers": {"text": [""]}}, 'field "answers.text" is [""]; it must be a list'),
        ("squad", {"answers": ["a"]}, 'field "answers" is ["a"]; it must be an object with "text"'),
    ],
)
def test_a_bad_value_is_named(tmp_path, name, change, message):
    task, good = get_task(name), GOOD[name]
    write(tmp_path, [good] * 3, [good, good | change])
    with pytest.raises(InputError) as caught:
        load_splits(task, tmp_path, num_train=1, num_dev=1)
    assert str(caught.value).startswith(f"{tmp_path / 'validation.jsonl'}:2: {message}")
    assert "\n" not in str(caught.value)


def test_a_missing_field_is_named_with_its_nearest(tmp_path):
    write(tmp_path, [{"sentense": "fine", "label": 1}])
    with pytest.raises(
        InputError, match=r'train.jsonl:1: field "sentence" is missing \(did you mean "sentense"\?\)'
    ):
        load_splits(SST2, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"sentence": "a", "label": 1}\n\n{"sentence": "b", label: 1}\n',
            ":3: not JSON at column 19 (Expecting",
        ),
        (
            b'{"sentence": "a", "label": 1}\n{"sentence": "caf\xe9", "label": 1}\n',
            ":2: byte 18 (0xe9) is not UTF-8; save",
        ),
        (b"[1, 2]\n", ":1: a row must be a JSON object, not [1, 2]"),
        (b"\n\n", ': no rows; task "sst2" needs at least one'),
        (b"", ': no rows; task "sst2" needs at least one'),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    write(tmp_path, sentences(3))
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_splits(SST2, tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'train.jsonl'}{message}")


def test_blank_lines_and_windows_line_ends_are_fine(tmp_path):
    write(tmp_path, sentences(3))
    (tmp_path / "train.jsonl").write_bytes(
        b'{"sentence": "a", "label": 1}\r\n\r\n{"sentence": "b", "label": 0}\r\n'
    )
    splits = load_splits(SST2, tmp_path, num_train=2, num_dev=0)
    assert sorted(row["sentence"] for row in splits.train) == ["a", "b"] and splits.dev == []


def test_missing_places_are_named(tmp_path):
    with pytest.raises(InputError, match=r"train.jsonl: no such file; the folder holds nothing"):
        load_splits(SST2, tmp_path)
    write(tmp_path, sentences(3))
    (tmp_path / "validation.jsonl").unlink()
    with pytest.raises(InputError, match=r"validation.jsonl: no such file; the folder holds train.jsonl"):
        load_splits(SST2, tmp_path)
    with pytest.raises(InputError, match=r"nowhere: no such folder; it should hold train.jsonl"):
        load_splits(SST2, tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"train.jsonl: not a folder"):
        load_splits(SST2, tmp_path / "train.jsonl")
    with pytest.raises(InputError, match="num_dev is -1; it must be at least 0"):
        load_splits(SST2, tmp_path, num_dev=-1)
    with pytest.raises(InputError, match="num_train is 0; it must be at least 1"):
        load_splits(SST2, tmp_path, num_train=0)
    with pytest.raises(InputError, match="data seed -1 is out of range"):
        load_splits(SST2, tmp_path, seed=-1)


# --- the Hub, with a stand-in for the `datasets` package


def fake_datasets(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


def test_hub_rows(monkeypatch):
    calls = []

    def load(name, config, split):
        calls.append((name, config, split))
        return sentences(8)

    fake_datasets(monkeypatch, load)
    splits = load_splits(SST2, None, num_train=4, num_dev=2)
    assert calls == [("nyu-mll/glue", "sst2", "train"), ("nyu-mll/glue", "sst2", "validation")]
    assert splits.origin["train"] == "nyu-mll/glue (sst2), split train"
    load_splits(SST2, "someone/reviews", num_train=4, num_dev=2)
    load_splits(SST2, "someone/reviews:plain", num_train=4, num_dev=2)
    assert calls[2::2] == [("someone/reviews", None, "train"), ("someone/reviews", "plain", "train")]


def test_hub_faults(monkeypatch):
    fake_datasets(monkeypatch, lambda *a, split: [*sentences(2), {"sentence": "x", "label": -1}])
    with pytest.raises(
        InputError, match=r'glue \(sst2\), split train, row 2 \(from 0\): field "label" is -1'
    ):
        load_splits(SST2)

    def offline(*_, split):
        raise ConnectionError("Couldn't reach the Hub\nlong story")

    fake_datasets(monkeypatch, offline)
    with pytest.raises(
        InputError, match="reviews, split train: no such folder, and the Hub gave: Couldn't reach the Hub;"
    ):
        load_splits(SST2, "reviews")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="reading the Hub needs `pip install datasets`"):
        load_splits(SST2)


def test_a_folder_needs_no_datasets_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    write(tmp_path, sentences(6))
    assert len(load_splits(SST2, tmp_path, num_train=4, num_dev=2).train) == 4
