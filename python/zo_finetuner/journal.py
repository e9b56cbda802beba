"""The journal of a run: a file that says, step by step, what was done to the weights.  Its format, and its reader.

    "ZOJOURNL"  format version u32  length u32  header (JSON, UTF-8)  CRC-32 of all that u32       then, at every step,
    step u64  seeds u64 * s  flags u32  lr f32  decay f32 * 0|1  losses f32 * l  coefs f32 * c  probes f32 * p
    scales f16|f32 * b  CRC-32 of the record u32

Little-endian, nothing in between; the header says how many of each there are (`Layout`), so that all records of a
journal have one size and the n-th is found without reading the others.  A record that a crash has torn off is cut; one
that is damaged in the middle is an error that names it.  docs/journal.md has the tables.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from zo_finetuner.errors import InputError, nearest
from zo_finetuner.reading import decode, open_file, parse_json

MAGIC = b"ZOJOURNL"
FORMAT_VERSION = 1
FINITE, FLUSHED = 1, 2  # bits of a record's flags
KINDS = ("sum", "rerun")
LIMITS = {"clip", "explosion", "max_skipped"}
MOST_HEADER, MOST_BYTES = 64 << 20, 16 << 30  # of a header; of a file: 100,000 steps of 10,000 scales are 2 GiB
_MOST = 1 << 20  # of anything in a record
PREFIX = len(MAGIC) + 8  # bytes before the header's text; the last four are its length


@dataclass(frozen=True)
class Layout:
    """How many of each a record has.  losses: all that a step asked for; coefs: of the update's terms; seeds: theirs,
    where they do not follow from the run's seed; probes: coefficients of probes made in place; scales: one for each
    block where a policy sets them anew at every step, in 2 or 4 bytes (`scale_bytes`)."""

    losses: int
    coefs: int = 0
    seeds: int = 0
    probes: int = 0
    decay: int = 0
    scales: int = 0
    scale_bytes: int = 2

    @property
    def dtype(self) -> numpy.dtype:
        named = [("step", "<u8", ()), ("seeds", "<u8", (self.seeds,)), ("flags", "<u4", ()), ("lr", "<f4", ()),
                 ("decay", "<f4", (self.decay,)), ("losses", "<f4", (self.losses,)), ("coefs", "<f4", (self.coefs,)),
                 ("probes", "<f4", (self.probes,)), ("scales", f"<f{self.scale_bytes}", (self.scales,)),
                 ("crc", "<u4", ())]  # fmt: skip
        return numpy.dtype(named)

    @property
    def size(self) -> int:
        """Bytes of a record."""
        return self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """kind: "sum" where every update is a sum of dense directions, so that the records alone rebuild the weights;
    "rerun" where the method's rule has to be run again on the losses.  terms: numbers of the directions (their seeds by
    the noise contract) of an update's terms; trail: (which direction, its number) of every probe made in place, -1 for
    the centre; fixed_scales: hexadecimal fp16 of a constant scale of every block.

    tensors: (name, id, shape, dtype) of every block in order.  fingerprint: of the base model (`cards.fingerprint`).
    limits: of the guard (`guards.Limits`).  method: what `make_method` takes besides the model, empty for one made by
    hand.  run: what the caller says of data and schedule."""

    kind: str
    layout: dict[str, int]
    seed: int
    eps: float
    weight_decay: float
    dist: str
    probing: str
    backend: str
    device: str
    versions: dict[str, str]
    noise_contract: int
    fingerprint: str
    tensors: list[list[Any]]
    method_name: str
    terms: list[int] = field(default_factory=list)
    trail: list[list[int]] = field(default_factory=list)
    fixed_scales: str = ""
    first_step: int = 0
    limits: dict[str, float] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """All that stands before the records.  InputError where `method` or `run` hold what is no JSON."""
        try:
            text = json.dumps(dataclasses.asdict(self), allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise InputError(f"journal: what the run says of itself is no JSON ({error})") from error
        start = MAGIC + FORMAT_VERSION.to_bytes(4, "little") + len(text).to_bytes(4, "little") + text
        return start + zlib.crc32(start).to_bytes(4, "little")

    @property
    def record(self) -> Layout:
        return Layout(**self.layout)

    @property
    def names(self) -> list[str]:
        return [tensor[0] for tensor in self.tensors]

    @property
    def ids(self) -> dict[str, int]:
        return {tensor[0]: tensor[1] for tensor in self.tensors}


@dataclass(frozen=True)
class Journal:
    """path; header; records: structured array of `Layout.dtype`, one for each step from `header.first_step` on; cut:
    bytes of a torn end that were left out; start: byte of the first record."""

    path: Path
    header: Header
    records: numpy.ndarray
    cut: int
    start: int

    @property
    def steps(self) -> int:
        """The step that a run with this journal would take next."""
        return self.header.first_step + len(self.records)

    def upto(self, step: int | None) -> numpy.ndarray:
        """Records of the steps before `step` (None: of all).  InputError for a step that it does not reach."""
        first = self.header.first_step
        if step is None:
            return self.records
        if not first <= step <= self.steps:
            raise InputError(f"{self.path}: holds steps {first} to {self.steps}, not {step}")
        return self.records[: step - first]


def read_journal(path: str | os.PathLike) -> Journal:
    """Header and records, all checked.  Raises InputError naming the file, and the key or the record and its byte."""
    path = Path(path)
    try:
        with open_file(path, MOST_BYTES) as stream:
            header = _read_header(path, stream)
            start = stream.tell()
            body = stream.read()
    except MemoryError:
        raise InputError(f"{path}: does not fit in memory") from None
    size = header.record.size
    count = len(body) // size
    good = _good_records(body, size, count)
    kept = _require_whole(path, body, size, good, start)
    records = numpy.frombuffer(body, dtype=header.record.dtype, count=kept)
    wrong = numpy.flatnonzero(records["step"] != header.first_step + numpy.arange(kept, dtype=numpy.uint64))
    if len(wrong):
        at = int(wrong[0])
        found = int(records["step"][at])
        raise InputError(f"{path}: record {at} (byte {start + at * size}) is of step {found}, not of step "
                         f"{header.first_step + at}: records are missing or out of order")
    return Journal(path, header, records, len(body) - kept * size, start)


def _good_records(body: bytes, size: int, count: int) -> list[bool]:
    view = memoryview(body)
    return [
        zlib.crc32(view[at : at + size - 4]) == int.from_bytes(view[at + size - 4 : at + size], "little")
        for at in range(0, count * size, size)
    ]


def _require_whole(path: Path, body: bytes, size: int, good: list[bool], start: int) -> int:
    """How many records are whole.  What a crash leaves is a last record in part, or followed by zeros."""
    kept = good.index(False) if False in good else len(good)
    if kept < len(good) - 1 and any(body[(kept + 1) * size :]):
        byte = start + kept * size
        raise InputError(f"{path}: record {kept} (byte {byte}) is damaged, and {len(good) - kept - 1} follow it: take "
                         f"another copy of the file, or cut this one there (truncate -s {byte})")
    return kept


def _read_header(path: Path, stream: Any) -> Header:
    prefix = stream.read(PREFIX)
    if prefix[: len(MAGIC)] != MAGIC or len(prefix) < PREFIX:
        raise InputError(f"{path}: is not a journal of zo-finetuner (it begins with {prefix[:8]!a})")
    version, length = (int.from_bytes(prefix[at : at + 4], "little") for at in (len(MAGIC), len(MAGIC) + 4))
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: is a journal of format {version}, this release reads {FORMAT_VERSION}: update "
                         f"zo-finetuner")
    if length > MOST_HEADER:
        raise InputError(f"{path}: its header claims {length} bytes, at most {MOST_HEADER} are read: it is damaged")
    text, checksum = stream.read(length), stream.read(4)
    if len(text) < length or len(checksum) < 4:
        raise InputError(f"{path}: ends inside its header: the run stopped before its first step was journalled")
    if zlib.crc32(prefix + text) != int.from_bytes(checksum, "little"):
        raise InputError(f"{path}: its header is damaged (checksum)")
    place = f"{path}: its header"
    return _checked(path, parse_json(decode(text, place), place, "it was not written by zo-finetuner"))


def _checked(path: Path, values: Any) -> Header:
    """Types and bounds of all that a reader relies on."""
    known = {entry.name: entry for entry in dataclasses.fields(Header)}
    if not isinstance(values, dict):
        raise InputError(f"{path}: its header is a {type(values).__name__}, not a dictionary")
    for key in values:
        if key not in known:
            raise InputError(f"{path}: unknown key {key[:80]!a} in its header{nearest(key[:80], known)}")
    for key, entry in known.items():
        if key not in values and entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise InputError(f'{path}: its header has no "{key}"')
        if key in values and not _fits(entry.type, values[key]):
            raise InputError(f'{path}: "{key}" in its header is not of type {entry.type}')
    header = Header(**values)
    problem = _problem(header)
    if problem:
        raise InputError(f"{path}: {problem} in its header")
    return header


def _fits(annotation: str, value: Any) -> bool:
    if annotation == "float":
        return type(value) in (int, float) and abs(value) < math.inf
    if annotation == "list[int]":
        return isinstance(value, list) and all(type(entry) is int for entry in value)
    if annotation.startswith("list[list"):
        return isinstance(value, list) and all(isinstance(entry, list) for entry in value)
    if annotation in ("dict[str, int]", "dict[str, str]"):
        kind = int if annotation.endswith("int]") else str
        return isinstance(value, dict) and all(type(entry) is kind for entry in value.values())
    if annotation.startswith("dict"):
        return isinstance(value, dict)
    return type(value).__name__ == annotation


def _problem(header: Header) -> str:
    """What is wrong with a header whose types are right; empty where nothing is."""
    if header.kind not in KINDS:
        return f"unknown kind {header.kind[:80]!a}"
    names = {entry.name for entry in dataclasses.fields(Layout)}
    if not header.layout.keys() <= names or "losses" not in header.layout:
        return f"unknown layout {str(header.layout)[:200]}"
    if not all(0 <= count <= _MOST for count in header.layout.values()):
        return f"a layout out of bounds {str(header.layout)[:200]}"
    layout = header.record
    if layout.scale_bytes not in (2, 4) or layout.decay > 1:
        return f"an impossible layout {str(header.layout)[:200]}"
    for number in (header.seed, header.first_step):
        if not 0 <= number < 1 << 64:
            return f"a seed or step {number} that is no unsigned 64-bit integer"
    for tensor in header.tensors:
        if not (len(tensor) == 4 and isinstance(tensor[0], str) and type(tensor[1]) is int and 0 <= tensor[1] < 1 << 32
                and isinstance(tensor[2], list) and all(type(size) is int and size >= 0 for size in tensor[2])
                and isinstance(tensor[3], str)):  # fmt: skip
            return f"a tensor {str(tensor)[:200]!a}"
    if not header.limits.keys() <= LIMITS or not all(_fits("float", limit) and limit >= 0
                                                     for limit in header.limits.values()):  # fmt: skip
        return f"unknown limits {str(header.limits)[:200]!a}"
    blocks = len(header.tensors)
    if len(set(header.names)) != blocks or len(set(header.ids.values())) != blocks:
        return "two tensors of one name or id"
    if layout.scales not in (0, blocks) or len(header.fixed_scales) not in (0, 4 * blocks):
        return f"scales that are not of its {blocks} tensors"
    if set(header.fixed_scales) - set("0123456789abcdef"):
        return "fixed_scales that are not hexadecimal"
    if header.kind == "sum":
        terms = layout.seeds if layout.seeds else len(header.terms)
        if not layout.coefs or terms != layout.coefs or len(header.trail) != layout.probes:
            return "terms or probes that are not those of its layout"
        if header.dist not in ("normal", "rademacher"):
            return f"an unknown distribution {header.dist[:80]!a}"
        if not all(0 <= number < _MOST for number in header.terms):
            return "a term of no direction"
        for probe in header.trail:
            if len(probe) != 2 or not all(type(n) is int and -1 <= n < _MOST for n in probe):
                return f"a probe {str(probe)[:80]!a}"
    return ""
