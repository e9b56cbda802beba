"""The header of a safetensors file, checked before any library maps the file.

    8 bytes          length of the header, little-endian
    header           JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {text: text}}
    data             the tensors, one behind the other, without gaps or overlaps

(https://huggingface.co/docs/safetensors, "Format".)  A header that lies about a size would otherwise be an allocation,
or a tensor that ends outside the file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo_finetuner.errors import InputError, nearest
from zo_finetuner.reading import decode, is_plain, open_file, parse_json, shown

MOST_HEADER = 100_000_000  # bytes, the format's own limit

#: Bits of an element.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
MEND = "fetch or save it again"


@dataclass(frozen=True)
class StoredTensor:
    dtype: str  # a key of BITS
    shape: tuple[int, ...]
    begin: int  # of its bytes, counted from the end of the header
    end: int


@dataclass(frozen=True)
class Header:
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_header(path: Path, most: int | None = None) -> Header:
    """What a safetensors file of at most `most` bytes says it holds, once that is the whole file.

    Raises InputError naming the file and the tensor: no such header, unknown dtypes, sizes that do not follow from
    dtype and shape, tensors that overlap or leave gaps, a file that is cut off or longer than its tensors."""
    with open_file(path, most) as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(size - 8, MOST_HEADER):
            raise InputError(f"{path}: is not a safetensors file, or is truncated; {MEND}")
        data = stream.read(length)
    if data[:1] != b"{":
        raise InputError(f"{path}: is not a safetensors file, or is truncated; {MEND}")
    place = f"{path}: damaged safetensors header"
    header = parse_json(decode(data, place), place, MEND)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: damaged safetensors header: __metadata__ is not texts by name; {MEND}")
    tensors = {name: _stored(path, name, entry) for name, entry in header.items()}
    _require_whole(path, tensors, size - 8 - length)
    return Header(tensors, metadata)


def _stored(path: Path, name: str, entry: Any) -> StoredTensor:
    if not name or not is_plain(name):
        raise InputError(f"{path}: {ascii(name[:80])} is no name of a tensor; {MEND}")
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where}: its header is not dtype, shape and data_offsets; {MEND}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise InputError(f"{where}: unknown dtype {shown(dtype)}{nearest(str(dtype)[:80], BITS)}; {MEND}")
    if not _is_sizes(shape):
        raise InputError(f"{where}: shape {shown(shape)} is not a list of sizes; {MEND}")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise InputError(f"{where}: data_offsets {shown(offsets)} are not two places; {MEND}")
    bits, (begin, end) = math.prod(shape) * BITS[dtype], offsets
    if end < begin or bits != 8 * (end - begin):
        raise InputError(f"{where}: {dtype} of shape {shown(shape)} has {shown(bits // 8)} bytes, its offsets "
                         f"{shown(offsets)} say otherwise; {MEND}")
    return StoredTensor(dtype, tuple(shape), begin, end)


def _require_whole(path: Path, tensors: dict[str, StoredTensor], held: int) -> None:
    reached, last = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != reached:
            what = "overlaps" if tensor.begin < reached else "leaves a gap behind"
            raise InputError(f"{path}: tensor {shown(name)} {what} {shown(last) or 'the header'}; {MEND}")
        reached, last = tensor.end, name
    if reached != held:
        raise InputError(f"{path}: holds {held:,} bytes of tensors but its header needs {reached:,}; {MEND}")


def _is_sizes(value: Any) -> bool:
    """Whether a JSON value is a list of at most 64 whole numbers from 0 to 2^63 - 1."""
    return isinstance(value, list) and len(value) <= 64 and all(type(v) is int and 0 <= v < 1 << 63 for v in value)
