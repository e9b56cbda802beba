"""The one exception that users are meant to see: bad input, told in one line.

The command line prints `zo: error: <message>` and exits with code 2; nothing has been written by then.
The message names the file, row, field, tensor or key, and says how to mend it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class InputError(ValueError):
    """Input that a user can mend: a file, a data row, an option, a model."""


class UnstableRun(InputError):
    """A run that was stopped, since most of its steps could not be taken."""


class RunStopped(RuntimeError):
    """A run that cannot go on, through no fault of its input; what is on disk can be resumed."""


def require_positive(name: str, value: float, hint: str = "") -> None:
    """InputError unless the value is above zero and finite."""
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{name} must be positive and finite, got {value}{hint}")


def require_not_negative(name: str, value: float) -> None:
    """InputError unless the value is zero or above, and finite."""
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"{name} must be zero or positive, got {value}")


def nearest(word: str, choices: Iterable[str]) -> str:
    """` (did you mean "x"?)` when something close to `word` is among `choices`, else an empty string."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f' (did you mean "{found[0]}"?)' if found else ""
