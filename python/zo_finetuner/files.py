"""Writing files and folders whole: under a temporary name first, then renamed.  A failure is an InputError."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from zo_finetuner.errors import InputError


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` at once; a reader sees the old file or the new one, never half of it."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same disk: os.replace is atomic there
    try:
        unfinished.unlink(missing_ok=True)  # of a process that was killed; a link there would be followed
        with unfinished.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made ({error.strerror}); choose another folder") from None


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=True) + "\n")


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which is `path` once the block has ended and all of it is on the disk: a reader sees what was
    there before or all that is new.  A full disk is an InputError, and what was there stays."""
    unfinished, old = path.with_name(f".{path.name}.unfinished"), path.with_name(f".{path.name}.old")
    for left in (unfinished, old):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        with told_as_unwritable(path):
            unfinished.mkdir(parents=True)
            yield unfinished
            for inner in [*unfinished.rglob("*"), unfinished]:
                _sync(inner)
            if path.exists():
                path.rename(old)
            unfinished.rename(path)
            _sync(path.parent)
    finally:
        for left in (unfinished, old):
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def told_as_unwritable(path: Path) -> Iterator[None]:
    """A write that fails within becomes one line: Python's, safetensors', or torch's (an error without a number)."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, RuntimeError) and not any(word in reason for word in ("StreamWriter", "iostream")):
            raise
        raise InputError(f"{path}: cannot be written ({reason[:200]})") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
