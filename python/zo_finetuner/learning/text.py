"""Plain text as rows: documents from .txt, .txt.xz or .jsonl files, cut into windows of equal length."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from zo_finetuner.encoding import Encoded
from zo_finetuner.errors import InputError

MOST_BYTES = 64 << 20  # of text that is read: 2,000 windows of 256 tokens are 2 MB


def text_windows(
    path: Path, tokenizer: Any, length: int, *, seed: int, counts: tuple[int, ...]
) -> tuple[list[Encoded], ...]:
    """Lists of counts[i] windows of `length` tokens; no document is in two lists.

    path: a .txt file (a line is a document), .txt.xz, .jsonl (a "text" field a line), or a folder of those.
    Documents are shuffled by `seed`.  A window is a row whose loss is over all its tokens but the first.
    Raises InputError naming the file, and when the text ends before the last list is full."""
    documents = list(read_documents(path))
    if not documents:
        raise InputError(f"{path}: holds no text")
    order = iter(np.random.RandomState(seed).permutation(len(documents)))
    lists: list[list[Encoded]] = []
    for count in counts:
        windows: list[Encoded] = []
        while len(windows) < count:
            place = next(order, None)
            if place is None:
                found = sum(map(len, lists)) + len(windows)
                raise InputError(
                    f"{path}: {len(documents)} documents give {found} windows of {length} tokens, {sum(counts)} are "
                    f"asked for; give more text, or smaller --num-train, --num-held-out or --text-length"
                )
            windows += _cut(tokenizer(documents[place], verbose=False)["input_ids"], length)
        lists.append(windows[:count])
    return tuple(lists)


def _cut(ids: list[int], length: int) -> Iterator[Encoded]:
    for start in range(0, len(ids) - length + 1, length):
        window = tuple(ids[start : start + length])
        yield Encoded("text", (window,), (length - 1,), (0,), window[:1])


def read_documents(path: Path) -> Iterator[str]:
    """The documents of a file or folder, MOST_BYTES at most.  Raises InputError naming file and line."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.name.endswith((".txt", ".txt.xz", ".jsonl")))
        if not files:
            raise InputError(f"{path}: holds no .txt, .txt.xz or .jsonl file")
    else:
        files = [path]
    left = MOST_BYTES
    for file in files:
        for number, line in enumerate(_lines(file, left), 1):
            left -= len(line)
            if line.strip():
                yield _text(line, f"{file}:{number}") if file.suffix == ".jsonl" else line
        if left <= 0:
            return


def _lines(file: Path, most: int) -> Iterator[str]:
    opened = lzma.open if file.suffix == ".xz" else open
    try:
        with opened(file, "rt", encoding="utf-8") as stream:
            for line in stream:
                yield line.rstrip("\n")
                most -= len(line)
                if most <= 0:
                    return
    except UnicodeDecodeError:
        raise InputError(f"{file}: is not UTF-8 text") from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise InputError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _text(line: str, place: str) -> str:
    try:
        row = json.loads(line)
    except ValueError:
        raise InputError(f"{place}: is not JSON; write one object a line") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise InputError(f'{place}: has no "text" field with a text')
    return row["text"]
