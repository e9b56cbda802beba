"""How fast a run goes and when it ends: measured between logging steps, and shown.

    Speed      seconds of a step and tokens per second, into the Trainer's log; nothing here waits for the device
    Progress   a bar on a terminal, else a line now and then
    LogFile    every entry of the log into a file as it comes
"""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from zo_finetuner.errors import InputError
from zo_finetuner.files import write_text

QUIET = 10.0  # seconds between two lines where there is no terminal


class Speed(TrainerCallback):
    """The clock of training steps.  It stands still in evaluations and while checkpoints are written."""

    def __init__(self) -> None:
        self._steps = self._tokens = 0
        self._since: float | None = None  # when the first step since the last log began
        self._ended = 0.0
        self._away = False  # something besides training came after the last step

    def count(self, window: Iterable[Mapping[str, Any]], ranks: int = 1) -> None:
        """A step's micro-batches: places of `input_ids` are tokens that each forward reads, padding included.  ranks:
        processes with rows of their own, which are taken to have as many."""
        self._tokens += ranks * sum(batch["input_ids"].numel() for batch in window if "input_ids" in batch)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        if self._since is None:
            self._since = now
        elif self._away:
            self._since += now - self._ended
        self._away = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._steps += 1
        self._ended = time.perf_counter()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._away = True

    on_save = on_evaluate

    def since_last_log(self) -> dict[str, float]:
        """{"seconds_per_step", "tokens_per_second"} of the steps since this was last asked; empty where there are
        none.  To be asked when the device is waited for anyway: what it has not yet done is not in the time."""
        steps, tokens, since = self._steps, self._tokens, self._since
        self._steps = self._tokens = 0
        self._since = None
        if not steps or since is None:
            return {}
        seconds = max(time.perf_counter() - since, 1e-9)
        return {"seconds_per_step": seconds / steps} | ({"tokens_per_second": tokens / seconds} if tokens else {})


class Progress(ProgressCallback):
    """The Trainer's bar with loss, |g| and tokens per second behind it, on a terminal.  Elsewhere a line of the same
    and the expected end: at the first and the last log, and not more often than every ten seconds.  Evaluations have a
    line on both."""

    def __init__(self) -> None:
        super().__init__()
        self._terminal = sys.stderr.isatty()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began, self._first, self._told = time.perf_counter(), state.global_step, -QUIET
        if self._terminal:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._terminal:
            super().on_step_end(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            self._show_step(state, describe_step(logs))
        elif evaluated := describe_evaluation(logs):
            self._line(f"step {state.global_step}: {evaluated}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._terminal:
            super().on_train_end(args, state, control, **kwargs)

    def _show_step(self, state: Any, text: str) -> None:
        if self._terminal:
            if self.training_bar is not None:
                self.training_bar.set_postfix_str(text, refresh=False)
            return
        passed, done, last = time.perf_counter() - self._began, state.global_step, state.max_steps
        if done < last and passed - self._told < QUIET:
            return
        self._told = passed
        left = passed / max(1, done - self._first) * (last - done)
        ends = (datetime.datetime.now() + datetime.timedelta(seconds=left)).strftime("%H:%M")
        self._line(f"step {done}/{last}: {text}, {clock(left)} left" + (f" (until {ends})" if left > 60 else ""))

    def _line(self, text: str) -> None:
        if self._terminal and self.training_bar is not None:
            self.training_bar.write(text)
        else:
            print(text, flush=True)


class LogFile(TrainerCallback):
    """Keeps the Trainer's log history in a file, a line of JSON for each entry, written as it comes: what was logged is
    there after a crash, and `zo report` shows a run that is not done."""

    def __init__(self, path: Path):
        self._path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:  # a resumed run goes on from the checkpoint's history
            write_text(self._path, "".join(json.dumps(entry) + "\n" for entry in state.log_history))

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero or not state.log_history:
            return
        try:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(state.log_history[-1]) + "\n")
        except OSError as error:
            raise InputError(f"{self._path}: cannot be written ({error.strerror})") from None


def describe_step(logs: Mapping[str, float]) -> str:
    """`loss 0.6931, |g| 12.5, 3,937 tokens/s` of a log's entry."""
    parts = [f"loss {logs['loss']:.4f}"]
    if "grad_norm" in logs:
        parts.append(f"|g| {logs['grad_norm']:.3g}")
    if "zo/tokens_per_second" in logs:
        parts.append(f"{logs['zo/tokens_per_second']:,.0f} tokens/s")
    if skipped := logs.get("zo/skipped_steps"):
        parts.append(f"{skipped:.0f} skipped")
    return ", ".join(parts)


def describe_evaluation(logs: Mapping[str, float]) -> str:
    """`dev loss 0.6812, accuracy 0.561` of a log's entry; "" where it is no evaluation."""
    if "eval_loss" not in logs:
        return ""
    others = [f"{name.removeprefix('eval_')} {value:.3f}" for name, value in logs.items()
              if name.startswith("eval_") and name not in TIMES and isinstance(value, float)]  # fmt: skip
    return ", ".join([f"dev loss {logs['eval_loss']:.4f}", *others])


#: What the Trainer's own evaluation adds to its metrics.
TIMES = {"eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time"}


def clock(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`"""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
