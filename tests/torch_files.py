"""Files as torch.save writes them, and pickle programs written by hand, for the tests of the readers."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from zo_finetuner.errors import InputError
from zo_finetuner.pertnn_io import load_pertnn

NAMES = ("model.embed_tokens.weight", "model.layers.0.q_proj.weight", "model.norm.weight")
PUBLISHED = ("llama1B", "llama8B", "opt30B", "qwen14B")
LABELS = ("w1", "b1", "w2", "b2")


def refused(path: Path, match: str) -> None:
    """Loading ends in one InputError line that names the file."""
    with pytest.raises(InputError, match=match) as caught:
        load_pertnn(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def network(*, inputs: int = 5, hidden: int = 64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 1))


def torch_file(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def torch_zip(
    path: Path,
    data: bytes,
    *,
    storages: dict[str, bytes] | None = None,
    byteorder: bytes = b"little",
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """A file laid out as torch.save does, with any bytes as its pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("nets/data.pkl", data)
        archive.writestr("nets/byteorder", byteorder)
        for key, content in (storages or {}).items():
            archive.writestr(f"nets/data/{key}", content)
    return path


# Pickle by hand.
def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def word(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def tuple_of(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def storage(key: str, numel: bytes, kind: str = "FloatStorage") -> bytes:
    return tuple_of(text("storage"), word("torch", kind), text(key), text("cpu"), numel) + b"Q"


def view(source: bytes, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    sizes, strides = tuple_of(*map(integer, shape)), tuple_of(*map(integer, stride))
    arguments = tuple_of(source, integer(offset), sizes, strides, b"\x89", ORDERED_DICT + b")R")
    return word("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


FLOAT, LINEAR = word("torch", "FloatStorage"), word("torch.nn.modules.linear", "Linear")
ORDERED_DICT = word("collections", "OrderedDict")


def program(body: bytes, *, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


# --- what is published, and what torch writes -----------------------------------------------------
