"""Reading files that may be broken or hostile: regular files of a bounded size, whose text is UTF-8 and whose JSON is
what it seems.  Every fault is an InputError of one line; nothing that a file says makes us wait or fills the memory.

A fifo would block its reader and a device never end, a line without an end fills the memory, a key that stands twice
means two things, and half a surrogate pair is a text that no tokenizer takes: all are refused here, for every reader.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from zo_finetuner.errors import InputError

MOST_LINE = 8 << 20  # bytes of a line: a row of 8 MiB is some two million tokens
MOST_DATA = 1 << 30  # bytes of a file of rows, which are all held in memory
MOST_JSON = 64 << 20  # bytes of a JSON file: the index of a checkpoint in 10,000 shards has some 10 MB
MOST_DEPTH = 64  # lists and objects inside each other: real files have 6

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


@contextlib.contextmanager
def open_file(path: Path, most: int | None = None) -> Iterator[BinaryIO]:
    """The bytes of a regular file.  InputError for anything else, for more than `most` bytes, and for what the disk
    says while it is read."""
    try:
        # Without O_NONBLOCK opening a pipe waits for somebody to write into it.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # a NUL in the name, or a name that is no text
        raise InputError(f"{shown(str(path))}: is no name of a file ({error})") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            kind = _KINDS.get(stat.S_IFMT(found.st_mode), "no regular file")
            raise InputError(f"{path}: is {kind}; give a regular file")
        if most is not None and found.st_size > most:
            raise InputError(f"{path}: has {found.st_size:,} bytes; at most {most:,} are read")
    except BaseException:
        os.close(descriptor)
        raise
    with os.fdopen(descriptor, "rb") as stream:
        try:
            yield stream
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def require_file(path: Path, most: int | None = None) -> int:
    """Size in bytes of a regular file that can be opened; for libraries that open files by name.  Raises InputError."""
    with open_file(path, most) as stream:
        return os.fstat(stream.fileno()).st_size


def read_bytes(path: Path, most: int) -> bytes:
    with open_file(path, most) as stream:
        size = os.fstat(stream.fileno()).st_size
        data = stream.read(size + 1)  # takes the memory at once, so not `most`
    if len(data) > size:  # files of /proc have no size
        raise InputError(f"{path}: grows while it is read; give a file that is finished")
    return data


def read_text(path: Path, most: int) -> str:
    """A whole UTF-8 file.  Raises InputError."""
    return decode(read_bytes(path, most), str(path))


def read_lines(path: Path, most: int = MOST_DATA) -> Iterator[tuple[str, bytes]]:
    """("file:line", its bytes without the line break) of every line that is not blank.  Raises InputError, also for a
    line of more than MOST_LINE bytes, of which no more than that is ever held."""
    with open_file(path, most) as stream:
        number = 0
        while line := stream.readline(MOST_LINE + 2):
            number, line = number + 1, line.rstrip(b"\r\n")
            if len(line) > MOST_LINE:
                raise InputError(f"{path}:{number}: the line has more than {MOST_LINE:,} bytes; write one row a line")
            if line.strip():
                yield f"{path}:{number}", line


def decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        fault = f"byte {error.start + 1} (0x{data[error.start]:02x}) is not UTF-8"
        raise InputError(f"{place}: {fault}; save the file as UTF-8") from None


def parse_json(text: str, place: str, mend: str, *, finite: bool = True) -> Any:
    """A JSON value of unique keys, whole texts and bounded depth; finite: without NaN and Infinity.

    Raises InputError naming `place` and closing with `mend`."""
    refuse = _refuse_constant if finite else None
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=refuse)
    except _Refused as error:
        raise InputError(f"{place}: {error}; {mend}") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise InputError(f"{place}: not JSON at {line}column {error.colno} ({error.msg}); {mend}") from None
    except ValueError:  # more than 4,300 digits
        raise InputError(f"{place}: not JSON: a number has too many digits; {mend}") from None
    except RecursionError:
        raise InputError(f"{place}: lists and objects lie deeper than {MOST_DEPTH} inside each other; {mend}") from None
    require_shallow(value, text.count("[") + text.count("{"), place, mend)
    if re.search(r"\\u[dD][89a-fA-F]", text) and not _is_text(value):
        raise InputError(f"{place}: a text holds half a surrogate pair (\\ud800 to \\udfff alone); {mend}")
    return value


def read_object(path: Path, mend: str, *, most: int = MOST_JSON, finite: bool = True) -> dict[str, Any]:
    """The JSON object in a file.  Raises InputError naming it."""
    value = parse_json(read_text(path, most), str(path), mend, finite=finite)
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds {kind_of(value)}, not a JSON object; {mend}")
    return value


def require_shallow(value: Any, brackets: int, place: str, mend: str) -> None:
    """InputError for lists and dicts deeper than MOST_DEPTH; brackets: at least as many as there are of them."""
    level, depth = [value], 0
    while brackets > MOST_DEPTH and (level := [outer for outer in level if isinstance(outer, (dict, list))]):
        depth += 1
        if depth > MOST_DEPTH:
            raise InputError(f"{place}: lists and objects lie deeper than {MOST_DEPTH} inside each other; {mend}")
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]


def kind_of(value: Any) -> str:
    """What a value of JSON is, in words."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return {dict: "an object", list: "a list", str: "a text"}.get(type(value), "a number")


def is_plain(text: str) -> bool:
    """Whether a text can be printed in one line as it is: no control characters, line breaks, halves of surrogates."""
    return re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", text) is None


def shown(value: Any, most: int = 80) -> str:
    """A value in an error message: printable, and no longer than `most` and an ellipsis."""
    text = value if isinstance(value, str) else repr(value)
    text = text[:most] + "..." if len(text) > most else text
    return text if is_plain(text) else ascii(text)


class _Refused(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _Refused(f'key "{shown(twice)}" stands twice in an object')
    return value


def _refuse_constant(name: str) -> Any:
    raise _Refused(f"{name} is no number of JSON")


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
