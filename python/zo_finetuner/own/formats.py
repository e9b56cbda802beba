"""Formats of rows, recognised from their columns (those of TRL):

    text                {"text": "..."}
    prompt-completion   {"prompt": "...", "completion": "..."}
    conversational      {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
                        or prompt and completion as such lists
    prompt              {"prompt": "..."}, or such a list: for an objective of one's own only

Columns of other names are mapped, `{"prompt": "question"}`.  Only one format may fit the first row (with a mapping, of
those that have the mapped columns), and every other row must be of that.  Other columns do not matter, but for `tools`
of a conversation, a list that the chat template is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from zo_finetuner.errors import InputError, nearest
from zo_finetuner.own.files import Located
from zo_finetuner.reading import kind_of, shown

COLUMNS = {
    "text": ("text",),
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "prompt": ("prompt",),
}
NAMES = ("text", "messages", "prompt", "completion")


class Format(NamedTuple):
    """name: a key of COLUMNS.  chat: its columns hold lists of messages."""

    name: str
    chat: bool

    def __str__(self) -> str:
        return f"conversational {self.name}" if self.chat and self.name != "messages" else self.name


class OwnRow(NamedTuple):
    """A checked row: where it stands, and its columns, those of the format under the format's names too."""

    place: str
    row: dict[str, Any]


def check_columns(columns: Mapping[str, str]) -> None:
    """InputError for a mapping of names that no format has."""
    for name in columns:
        if name not in NAMES:
            raise InputError(f'--columns {name}=...: no such column{nearest(name, NAMES)}; write NAME=COLUMN, NAME one '
                             f"of {', '.join(NAMES)}")


def check_rows(
    rows: Sequence[Located], columns: Mapping[str, str], known: tuple[str, Format] | None = None
) -> tuple[tuple[str, Format], list[OwnRow]]:
    """((first place, format), checked rows).  known: place and format of a row in another file.  Raises InputError for
    the first row at fault."""
    checked = []
    for place, row in rows:
        row = _mapped(place, row, columns)
        if known is None:
            known = place, recognise(place, row, columns)
        first, format = known
        if _fits(row, format.name) != format:
            _refuse(place, row, columns, first, format)
        for name in COLUMNS[format.name]:
            fault = _messages_fault(row[name], name) if format.chat else _text_fault(row[name], name)
            if fault:
                raise InputError(f"{place}: {fault}")
            if format.chat:  # tables fill the keys that a message has not with None, which templates take for there
                row[name] = [{k: v for k, v in message.items() if v is not None} for message in row[name]]
        checked.append(OwnRow(place, row))
    return known, checked


def recognise(place: str, row: Mapping[str, Any], columns: Mapping[str, str]) -> Format:
    """The one format that a row's columns fit.  Raises InputError."""
    fitting = [name for name, needed in COLUMNS.items() if _has(row, needed) and set(columns) <= set(needed)]
    if len(fitting) > 1 and "prompt" in fitting:
        fitting.remove("prompt")  # it learns from the least
    if len(fitting) > 1:
        raise InputError(
            f"{place}: its columns are those of {' and '.join(fitting)}; say which is meant, for example "
            f"{' '.join(f'--columns {name}={name}' for name in COLUMNS[fitting[-1]])}"
        )
    if fitting:
        return _fits(row, fitting[0])
    raise InputError(
        f"{place}: no format has its columns ({shown(', '.join(map(str, row)), 120)}); they must be text, or messages, "
        f"or prompt and completion: name yours with --columns, for example --columns prompt=question "
        f"--columns completion=answer"
    )


def _mapped(place: str, row: Any, columns: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{place}: a row must be an object with columns, not {kind_of(row)}")
    for name, column in columns.items():
        if row.get(column) is None:
            there = [str(key) for key, value in row.items() if value is not None]
            raise InputError(
                f'{place}: no column "{shown(column)}", which --columns takes as {name}{nearest(column, there)}; '
                f"it has {shown(', '.join(there), 120) or 'none'}"
            )
    return row | {name: row[column] for name, column in columns.items()}


def _has(row: Mapping[str, Any], needed: Sequence[str]) -> bool:
    return all(row.get(name) is not None for name in needed)  # tables fill absent columns with None


def _fits(row: Mapping[str, Any], name: str) -> Format | None:
    """The format that a row has when it is read as one of this name."""
    if not _has(row, COLUMNS[name]):
        return None
    return Format(name, name == "messages" or (name != "text" and isinstance(row["prompt"], list)))


def _refuse(place: str, row: Mapping[str, Any], columns: Mapping[str, str], first: str, format: Format) -> None:
    try:
        found = f"is {recognise(place, row, columns)}"
    except InputError:
        found = f"has no {' and '.join(name for name in COLUMNS[format.name] if not _has(row, (name,)))}"
    raise InputError(f"{place}: {found}, but {first} is {format}; all rows must have one format")


def _text_fault(value: Any, name: str) -> str | None:
    if not isinstance(value, str):
        return f'"{name}" is {kind_of(value)}; it must be a text'
    if not value and name != "prompt":
        return f'"{name}" is empty: nothing to learn; leave the row out'
    return None


def _messages_fault(value: Any, name: str) -> str | None:
    if not isinstance(value, list) or not value:
        return f'"{name}" is {kind_of(value) if value != [] else "empty"}; it must be a list of messages'
    for number, message in enumerate(value):
        for key in ("role", "content"):
            given = message.get(key) if isinstance(message, dict) else None
            called = key == "content" and isinstance(message, dict) and message.get("tool_calls")
            if not isinstance(given, str) and not called:
                wanted = '{"role": "user", "content": "..."}'
                return f'message {number} of "{name}" (from 0) has no text "{key}"; write {wanted}'
    if name != "prompt" and not any(message["role"] == "assistant" for message in value):
        return f'"{name}" has no message of role "assistant": nothing to learn; leave the row out'
    return None
