"""`zo train` in a process of its own that starts in milliseconds: forked from this one, which has everything imported.

    child = start(argv, before=lambda: ...)      before: patches that only the child sees
    code = wait(child)                           the exit code, minus the signal that killed it
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from zo_finetuner.cli import main


@dataclass
class Child:
    pid: int
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def ended(self) -> int | None:
        """The exit code, once; None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None


def start(argv: list[str], log: Path, before: Callable[[], None] = lambda: None) -> Child:
    pid = os.fork()
    if pid:
        return Child(pid, log)
    code = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        sys.stdout = sys.stderr = os.fdopen(file, "w", buffering=1)  # not those of pytest
        gc.freeze()  # what was imported is not searched for garbage, page by page
        before()
        code = main(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # nothing of pytest's runs in the child


def wait(child: Child, seconds: float = 120.0) -> int:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        code = child.ended()
        if code is not None:
            return code
        time.sleep(0.005)
    child.kill()
    raise TimeoutError(f"the run has not ended in {seconds} s:\n{child.text[-2000:]}")
