"""Where two journals part: fields of the header that differ, and the first step that does, with the field."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy

from zo_finetuner.journal import Header, Journal

LONGEST = 60  # characters of a value


def compared(a: Journal, b: Journal) -> tuple[str, bool]:
    """A short text, and whether all steps are the same."""
    lines = [f"{name}: {_short(one)} / {_short(other)}" for name, one, other in _header_differences(a.header, b.header)]
    step, what = _first_difference(a, b)
    steps = f"{a.steps} / {b.steps} steps" if a.steps != b.steps else f"{a.steps} steps"
    if step is None and not lines:
        return f"the same header and the same {steps}", True
    head = [f"header, {len(lines)} differ: {lines[0]}", *(f"  {line}" for line in lines[1:8])] if lines else []
    if len(lines) > 8:
        head.append(f"  and {len(lines) - 8} more")
    if step is None:
        return "\n".join([*head, f"every step is the same ({steps})"]), True
    return "\n".join([*head, f"they part at step {step}: {what} ({steps})"]), False


def _header_differences(a: Header, b: Header) -> list[tuple[str, Any, Any]]:
    found = []
    for entry in dataclasses.fields(Header):
        one, other = getattr(a, entry.name), getattr(b, entry.name)
        if entry.name == "tensors":
            found += _tensor_difference(one, other)
        elif isinstance(one, dict):
            found += _key_differences(entry.name, one, other)
        elif one != other:
            found.append((entry.name, one, other))
    return found


def _key_differences(name: str, a: dict, b: dict, depth: int = 1) -> list[tuple[str, Any, Any]]:
    found = []
    for key in sorted(a.keys() | b.keys(), key=str):
        one, other = a.get(key, "-"), b.get(key, "-")
        if depth and isinstance(one, dict) and isinstance(other, dict):  # run.config has settings of its own
            found += _key_differences(f"{name}.{key}", one, other, depth - 1)
        elif one != other:
            found.append((f"{name}.{key}", one, other))
    return found


def _tensor_difference(a: list, b: list) -> list[tuple[str, Any, Any]]:
    for one, other in zip(a, b, strict=False):
        if one != other:
            return [("tensors", one, other)]
    return [("tensors", len(a), len(b))] if len(a) != len(b) else []


def _first_difference(a: Journal, b: Journal) -> tuple[int | None, str]:
    """The first step that is not the same in both, and what is not; bits are compared, so that NaN is NaN."""
    begin = max(a.header.first_step, b.header.first_step)
    common = min(a.steps, b.steps) - begin
    if a.header.first_step != b.header.first_step:
        return begin, f"one begins at step {a.header.first_step}, the other at {b.header.first_step}"
    best: tuple[int, str] | None = None
    for name in (n for n in a.records.dtype.names if n not in ("crc", "step")):
        one, other = a.records[name][:common], b.records[name][:common]
        if one.shape != other.shape or one.dtype != other.dtype:
            best = _earlier(best, begin, f"{name} of shape {one.shape[1:]} / {other.shape[1:]}")
            continue
        if not one.size:
            continue
        width = one.size // common
        bits = [numpy.ascontiguousarray(x).view(f"u{x.dtype.itemsize}").reshape(common, width) for x in (one, other)]
        rows, places = numpy.nonzero(bits[0] != bits[1])
        if len(rows):
            values = [x.reshape(common, width)[rows[0], places[0]] for x in (one, other)]
            place = f"[{places[0]}]" if width > 1 else ""
            best = _earlier(best, begin + int(rows[0]), f"{name}{place} {values[0]} / {values[1]}")
    if best is None and a.steps != b.steps:
        return begin + common, "one of them ends"
    return best or (None, "")


def _earlier(best: tuple[int, str] | None, step: int, what: str) -> tuple[int, str]:
    return (step, what) if best is None or step < best[0] else best


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
