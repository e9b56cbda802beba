"""Ctrl-C and SIGTERM while a run trains: once, the step is finished and saved; twice, it stops at once."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

from transformers import TrainerCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run that ended before its time, at the end of a step."""


class StopAfterStep(TrainerCallback):
    """`with StopAfterStep(how, kept) as stop:` around a training that has it among its callbacks.  Raises Interrupted
    when the step is finished and kept.  how: the command that goes on.  kept: "checkpoint", which is written first (and
    an evaluation that is due is made), "journal", which has the step already, or "" for a run that keeps nothing.
    listen: not where several processes train together, which would stop at different steps and wait for each other."""

    def __init__(self, how: str, kept: str, listen: bool = True):
        self.how, self.kept, self.asked, self._listens = how, kept, False, listen
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopAfterStep:
        if self._listens and threading.current_thread() is threading.main_thread():  # Python's rule for handlers
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("zo: stopping after this step; once more stops at once", file=sys.stderr, flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.asked or state.global_step >= state.max_steps:  # the last step ends the run anyway
            return
        if self.kept == "checkpoint":
            control.should_save = True
        elif self.kept == "journal":
            raise self._stopped(state)
        else:
            raise Interrupted(f"interrupted after step {state.global_step}; nothing was kept (--no-checkpoints, "
                              f"--no-journal)")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked and state.global_step < state.max_steps:
            raise self._stopped(state)

    def _stopped(self, state: Any) -> Interrupted:
        return Interrupted(f"interrupted; step {state.global_step} is kept ({self.kept}), go on with: {self.how}")
