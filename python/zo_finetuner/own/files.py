"""Rows of a file, of a folder of splits or of the Hub, each with the place that an error names.

JSONL, JSON and CSV are read here and not by `datasets`: that one names no line, casts types silently ("007" becomes 7)
and writes a copy of everything into its cache.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from zo_finetuner.errors import InputError
from zo_finetuner.reading import MOST_DATA, decode, parse_json, read_bytes, read_lines, read_text, require_file, shown

Located = tuple[str, Any]  # a place ("file:line") and the row there
NAMES = {"train": ("train",), "dev": ("validation", "valid", "val", "dev"), "test": ("test",)}


class Source(NamedTuple):
    """Where rows come from, and the rows; not empty."""

    origin: str
    rows: list[Located]


def read_source(source: str) -> dict[str, Source]:
    """The splits "train", "dev" and "test" of a folder or Hub dataset ("owner/name" or "owner/name:configuration"),
    those that there are; of a single file {"": its rows}.  Raises InputError."""
    path = Path(source).expanduser()
    if path.is_dir():
        found = _read_folder(path)
    elif path.exists() or path.suffix in READERS:
        found = {"": Source(str(path), list(_read_file(path)))}
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise InputError(f"{source}: no such file or folder")
    else:
        found = _read_hub(source)
    for origin, rows in found.values():
        if not rows:
            raise InputError(f"{origin}: no rows; give at least one")
    return found


def _read_file(path: Path) -> Iterator[Located]:
    if path.suffix not in READERS:
        raise InputError(f"{path}: must end in {', '.join(READERS)}")
    return READERS[path.suffix](path)


def _read_folder(folder: Path) -> dict[str, Source]:
    if (folder / "dataset_dict.json").is_file():
        return _splits_of(str(folder), lambda datasets: datasets.load_from_disk(str(folder)), "it cannot be loaded")
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        # "train.jsonl", or "train-00000-of-00002.parquet" as the Hub keeps its files
        name = re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)
        split = next((split for split, names in NAMES.items() if name in names), None)
        if split and path.suffix in READERS:
            found.setdefault(split, []).append(path)
    if not found:
        names = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise InputError(
            f"{folder}: holds no train, validation or test file ({', '.join(READERS)}) but {shown(names, 200)}; "
            f"rename it, or give the file itself"
        )
    for paths in found.values():
        whole = [path for path in paths if "-of-" not in path.stem]
        if whole and len(paths) > 1:
            raise InputError(f"{folder}: {paths[0].name} and {paths[1].name} are the same split; keep one")
    return {
        split: Source(_origin(paths), [row for path in paths for row in _read_file(path)])
        for split, paths in found.items()
    }


def _origin(paths: list[Path]) -> str:
    return f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}"


def _read_jsonl(path: Path) -> Iterator[Located]:
    for place, line in read_lines(path):
        yield place, parse_json(decode(line, place), place, "write one object a line")


def _read_json(path: Path) -> Iterator[Located]:
    """A list of objects; or, under this name too, one object a line."""
    text = read_text(path, MOST_DATA)
    if not text.lstrip().startswith("["):
        yield from _read_jsonl(path)
        return
    for number, row in enumerate(parse_json(text, str(path), "write a list of objects")):
        yield f"{path}, item {number} (from 0)", row


def _read_csv(path: Path) -> Iterator[Located]:
    """Columns by the names in the first line; every value is a text, as it stands there."""
    text = decode(read_bytes(path, MOST_DATA), str(path)).removeprefix("\ufeff")  # Excel's mark
    csv.field_size_limit(MOST_DATA)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    try:
        for fields in reader:
            place = f"{path}:{reader.line_num}"
            if header is None:
                header = fields
                if len(set(header)) < len(header):
                    twice = Counter(header).most_common(1)[0][0]
                    raise InputError(f'{place}: column "{shown(twice)}" stands twice in the header')
            elif fields:
                if len(fields) != len(header):
                    raise InputError(f"{place}: has {len(fields)} fields, the header has {len(header)}; quote texts "
                                     f'with commas: "a, b"')
                yield place, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: not CSV ({error})") from None


def _read_parquet(path: Path) -> Iterator[Located]:
    require_file(path)
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: reading Parquet needs `pip install datasets`, which brings pyarrow") from None
    number = size = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for column in batch.columns:  # a value that rows share is stored once, and each row is given its own
                    shared = isinstance(column, pyarrow.DictionaryArray)
                    size += (column.dictionary_decode() if shared else column).nbytes
                if size > MOST_DATA:
                    raise InputError(f"{path}: unpacks to more than {MOST_DATA:,} bytes, which is all that is read")
                for row in batch.to_pylist():
                    yield f"{path}, row {number} (from 0)", row
                    number += 1
    except InputError:
        raise
    except Exception as error:  # a dozen types come from there
        raise InputError(f"{path}: is no Parquet file that can be read ({_reason(error)})") from None


READERS: dict[str, Callable[[Path], Iterator[Located]]] = {
    ".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet,
}  # fmt: skip


def _read_hub(source: str) -> dict[str, Source]:
    name, _, config = source.partition(":")
    fault = "no such file or folder, and the Hub gave"
    return _splits_of(source, lambda datasets: datasets.load_dataset(name, config or None), fault)


def _splits_of(source: str, load: Callable[[Any], Any], fault: str) -> dict[str, Source]:
    """load: the package `datasets` -> splits by name."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"{source}: reading it needs `pip install datasets`; or give a file") from None
    try:
        splits = load(datasets)
    except Exception as error:  # a dozen unrelated types come from here; the first line says what happened
        raise InputError(f"{source}: {fault}: {_reason(error)}") from error
    found = {}
    for split, names in NAMES.items():
        name = next((name for name in names if name in splits), None)
        if name:
            origin = f"{source}, split {name}"
            rows = [(f"{origin}, row {i} (from 0)", dict(row)) for i, row in enumerate(splits[name])]
            found[split] = Source(origin, rows)
    if not found:
        raise InputError(f"{source}: has no split named train, validation or test but {', '.join(splits)}")
    return found


def _reason(error: Exception) -> str:
    return shown((str(error).strip().splitlines() or [type(error).__name__])[0], 200)
