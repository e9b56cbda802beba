"""A run of learning on disk, at the ends of its windows: there the base model has its own weights again, so that the
networks, their optimizer and a few numbers are everything that a bit-equal resume needs."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch

from zo_finetuner.errors import InputError
from zo_finetuner.files import write_bytes

STATE, RESULT, LEARNED, LOG, PICTURE = "state.pt", "result.json", "learned.safetensors", "log.jsonl", "scales.png"


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
    try:
        state = torch.load(out / STATE, map_location="cpu", weights_only=True)
        theirs = state["settings"]
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{out / STATE}: cannot be read ({reason}); start again with --overwrite") from None
    mine = json.loads(json.dumps(outcome))
    different = [name for name in mine if theirs.get(name) != mine[name]]
    if different:
        name = different[0]
        raise InputError(
            f"cannot resume {out}: {name} was {theirs.get(name)!r} and is {mine[name]!r}; give the same settings, or "
            f"another --output-dir"
        )
    return state


def save_state(out: Path, outcome: dict[str, Any], state: dict[str, Any]) -> None:
    """Replace the state on disk at once."""
    content = io.BytesIO()
    torch.save({"settings": outcome, **state}, content)
    write_bytes(out / STATE, content.getvalue())
