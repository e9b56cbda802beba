"""A run of learning on disk, at the ends of its windows: there the base model has its own weights again, so that the
networks, their optimizer and a few numbers are everything that a bit-equal resume needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zo_finetuner.errors import InputError
from zo_finetuner.learning.learner import Learner
from zo_finetuner.reading import shown
from zo_finetuner.state_files import read_state, write_state

STATE, LEARNED = "state.safetensors", "learned.safetensors"
RESULT, LOG, PICTURE = "result.json", "log.jsonl", "scales.png"
AGAIN = "start again with --overwrite"


def saved_state(out: Path, outcome: dict[str, Any], *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """The state to go on from, or None to start.  outcome: the settings that the result depends on.

    Raises InputError rather than touch an earlier run, and for a run with other settings."""
    if out.exists() and not out.is_dir():
        raise InputError(f"output_dir {out}: is a file")
    held = [name for name in (STATE, RESULT, LEARNED) if (out / name).exists()]
    if not resume:
        if held and not overwrite:
            raise InputError(f"output_dir {out}: holds a run; choose another, or give --resume or --overwrite")
        return None
    if STATE not in held:
        return None
    state = read_state(out / STATE, AGAIN)
    theirs = state.get("settings") if isinstance(state, dict) else None
    if not isinstance(theirs, dict):
        raise InputError(f"{out / STATE}: holds no settings; {AGAIN}")
    mine = json.loads(json.dumps(outcome))
    different = [name for name in mine if theirs.get(name) != mine[name]]
    if different:
        name = different[0]
        raise InputError(
            f"cannot resume {out}: {name} was {shown(repr(theirs.get(name)))} and is {mine[name]!r}; give the same "
            f"settings, or another --output-dir"
        )
    return state


def save_state(out: Path, outcome: dict[str, Any], state: dict[str, Any]) -> None:
    """Replace the state on disk at once."""
    write_state(out / STATE, {"settings": outcome, **state})


def restore(learner: Learner, state: dict[str, Any], out: Path) -> None:
    """Put a state back.  InputError where it does not fit: it was written by another release, or by hand."""
    try:
        learner.load_state_dict(state)
        whole = type(learner.window) is int and len(learner.snapshots) == learner.window + 1
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError):
        whole = False
    if not whole:
        raise InputError(f"{out / STATE}: does not fit this model and these settings; {AGAIN}")
