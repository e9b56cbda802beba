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
    """`with StopAfterStep(how) as stop:` around a training that has it among its callbacks.  Raises Interrupted when
    the step, an evaluation that is due and a checkpoint (saves) are finished.  how: to go on, for the message."""

    def __init__(self, how: str, saves: bool):
        self.how, self.saves, self.asked = how, saves, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopAfterStep:
        if threading.current_thread() is threading.main_thread():  # Python's rule for handlers
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
        if not self.saves:
            raise Interrupted(f"interrupted after step {state.global_step}; nothing was saved (--no-checkpoints)")
        control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked and state.global_step < state.max_steps:
            raise Interrupted(f"interrupted; step {state.global_step} is saved, go on with: {self.how}")
