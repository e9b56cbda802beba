"""Plain text as rows: documents from .txt, .txt.xz or .jsonl files, cut into windows of equal length."""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from zo_finetuner.encoding import Encoded
from zo_finetuner.errors import InputError
from zo_finetuner.reading import MOST_LINE, decode, open_file, parse_json

MOST_BYTES = 64 << 20  # of text that is read: 2,000 windows of 256 tokens are 2 MB
MOST_XZ = 256 << 20  # bytes of memory to unpack with; `xz -9` needs 65 MB
CHUNK = 1 << 20


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
            left -= len(line) + 1
            place = f"{file}:{number}"
            text = decode(line, place)
            if text.strip():
                yield _text(text, place) if file.suffix == ".jsonl" else text
        if left <= 0:
            return


def _lines(file: Path, most: int) -> Iterator[bytes]:
    """Lines without their ends, until they are `most` bytes.  A line is MOST_LINE bytes at most."""
    number, held = 0, b""
    with open_file(file) as stream:
        for chunk in _unpacked(file, stream) if file.suffix == ".xz" else iter(lambda: stream.read(CHUNK), b""):
            *lines, held = (held + chunk).split(b"\n")
            for line in lines:
                number += 1
                yield line.rstrip(b"\r")
                most -= len(line) + 1
            if most <= 0:
                return
            if len(held) > MOST_LINE:
                raise InputError(f"{file}:{number + 1}: the line has more than {MOST_LINE:,} bytes; put every document "
                                 "on a line of its own")
    if held:
        yield held


def _unpacked(file: Path, stream: BinaryIO) -> Iterator[bytes]:
    """What an .xz file holds, in chunks of 4 MiB at most however small it is packed."""
    unpack = lzma.LZMADecompressor(memlimit=MOST_XZ)
    try:
        while not unpack.eof:
            packed = stream.read(CHUNK) if unpack.needs_input else b""
            if unpack.needs_input and not packed:
                raise EOFError("it ends before its end mark")
            yield unpack.decompress(packed, max_length=4 * CHUNK)
    except (EOFError, lzma.LZMAError) as error:
        raise InputError(f"{file}: cannot be read ({error}); pack it again with xz") from None


def _text(line: str, place: str) -> str:
    row = parse_json(line, place, "write one object a line")
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise InputError(f'{place}: has no "text" field with a text; write one such object a line')
    return row["text"]
