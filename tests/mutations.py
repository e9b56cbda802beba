"""Hypothesis strategies that break valid files where it hurts: places in a JSON tree, numbers in a header, bytes."""

from __future__ import annotations

import json
import math
from typing import Any

from hypothesis import strategies as st


class Pairs(list):
    """An object as (key, value) pairs, so that a key can stand twice."""


DEEP = "[" * 3000 + "]" * 3000
HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, -(2**63), 10**400, 1.5, -1e-320, 1e308, math.nan, math.inf, -math.inf,
    "", " ", "0", "nan", "\x00", "a\nb", "\x1b[2J", "\ud800", "\u2028", "é" * 9, "x" * 5000, "../../etc/passwd",
    "/etc/passwd", "..", "[]", [], {}, [[]], [None], ["a", "a"], {"": ""}, [0] * 70, [-1, -1], [2**62, 4], 1e-6,
]  # fmt: skip
BYTES = [b"\x00", b"\xff", b"\n", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b"\xc3", b"\xed\xa0\x80", b"NaN", b"1e999",
         b"9" * 5000, b"[" * 3000, b"\x00" * 64, b"\xef\xbb\xbf"]  # fmt: skip
NUMBERS = [0, 1, 7, 8, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


def places(size: int) -> st.SearchStrategy[int]:
    return st.integers(0, max(size - 1, 0))


@st.composite
def mangled(draw: Any, data: bytes, most: int = 4) -> bytes:
    """Bits flipped, pieces cut out, repeated or put in, numbers overwritten, the end taken away."""
    for _ in range(draw(st.integers(1, most))):
        at, kind = draw(places(len(data))), draw(st.integers(0, 6))
        size = draw(st.sampled_from((1, 2, 8, 64, 1000)))
        if kind == 0 and data:
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data = data[:at] + data[at + size :]
        elif kind == 3:
            data = data[: at + size] + data[at:]
        elif kind == 4:
            data = data[:at] + draw(st.sampled_from(BYTES)) + data[at:]
        elif kind == 5:
            width = draw(st.sampled_from((1, 2, 4, 8)))
            value = draw(st.sampled_from(NUMBERS)) % (1 << 8 * width)
            data = data[:at] + value.to_bytes(width, "little") + data[at + width :]
        else:
            other = draw(places(len(data)))
            data = data[:at] + data[other : other + size] + data[at + size :]
    return data


@st.composite
def edited(draw: Any, value: Any, most: int = 3) -> str:
    """JSON of `value` after some edits of its tree: values replaced, moved, taken away or wrapped, keys renamed or
    doubled."""
    tree = _open(value)
    for _ in range(draw(st.integers(0, most))):
        spots = list(_spots(tree))
        if not spots:
            break
        holder, at = spots[draw(places(len(spots)))]
        _edit(draw, holder, at, spots)
    return spelled(tree)


def _edit(draw: Any, holder: list, at: int, spots: list) -> None:
    kind = draw(st.integers(0, 5))
    if kind == 1:
        del holder[at]
    elif kind == 2:
        holder.append(holder[at])
    elif kind == 3 and isinstance(holder, Pairs):
        key = draw(st.sampled_from([key for key in HOSTILE if isinstance(key, str)]) | st.text(max_size=3))
        holder[at] = (key, holder[at][1])
    else:
        if kind == 4:
            new = [_get(holder, at)]
        elif kind == 5:
            new = json.loads(spelled(_get(*spots[draw(places(len(spots)))]), twice=False))
        else:
            new = draw(st.sampled_from(HOSTILE) | st.integers() | st.floats() | st.text(max_size=5))
        holder[at] = (holder[at][0], _open(new)) if isinstance(holder, Pairs) else _open(new)


def spelled(tree: Any, twice: bool = True) -> str:
    if isinstance(tree, Pairs):
        pairs = tree if twice else dict(tree).items()
        return "{" + ", ".join(f"{json.dumps(key)}: {spelled(value, twice)}" for key, value in pairs) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(spelled(value, twice) for value in tree) + "]"
    return json.dumps(tree)


def _open(value: Any) -> Any:
    if isinstance(value, dict):
        return Pairs((key, _open(inner)) for key, inner in value.items())
    return [_open(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _get(holder: list, at: int) -> Any:
    return holder[at][1] if isinstance(holder, Pairs) else holder[at]


def _spots(tree: Any) -> Any:
    """(list or Pairs, index) of every value inside a tree."""
    if isinstance(tree, list):
        for at in range(len(tree)):
            yield tree, at
            yield from _spots(_get(tree, at))


@st.composite
def sometimes_mangled(draw: Any, strategy: st.SearchStrategy[bytes]) -> bytes:
    """One file in three is broken in its bytes too."""
    data = draw(strategy)
    return draw(mangled(data)) if draw(st.integers(0, 2)) == 2 else data


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
