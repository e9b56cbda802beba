"""Writing result files whole: under a temporary name first, then renamed.  A failure is an InputError."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from zo_finetuner.errors import InputError


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` at once; a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made ({error.strerror}); choose another folder") from None


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=True) + "\n")
