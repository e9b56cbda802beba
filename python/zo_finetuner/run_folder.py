"""The folder of a run: whose it is, what an earlier run left in it, and whether it can be written.

One run at a time: OUT/.lock is held with flock from before anything is written until the run ends, and says who holds
it.  The kernel lets go of it when a process dies, so a killed run leaves no lock behind.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
from pathlib import Path
from typing import Any

from zo_finetuner.checkpoints import checkpoints, is_whole
from zo_finetuner.errors import InputError
from zo_finetuner.files import make_folder
from zo_finetuner.reading import shown
from zo_finetuner.yaml_file import read_yaml

logger = logging.getLogger(__name__)

JOURNAL, LOG = "journal.zoj", "log.jsonl"
OWN_FILES = ("config.yaml", "result.json", "before.json", "curve.png", "report.html", JOURNAL, LOG)
#: Settings in which a resumed run may differ from the one before: they change no weight.
FREE = {"resume", "overwrite", "output_dir", "logging_steps", "report_to", "save_model", "max_skipped", "graphs",
        "probe_ranks", "push_to_hub"}


class RunFolder:
    """`with RunFolder(path) as folder: ...; folder.open()`: from then on it is this run's alone.

    resume, overwrite: what may be done with an earlier run.  Raises InputError for a folder that is a file, that holds
    a run and neither is allowed, that another run holds, or that cannot be written."""

    def __init__(self, path: Path, resume: bool = False, overwrite: bool = False):
        self.path, self.resume, self.overwrite = path, resume, overwrite
        self._lock: int | None = None

    def __enter__(self) -> RunFolder:
        try:
            self._check()
        except InputError:
            self.close()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def open(self) -> None:
        """Make it, lock it, and take away what a killed run left unfinished, and what --overwrite is meant for."""
        make_folder(self.path)
        if self._lock is None:
            self._check()
        for name in OWN_FILES:
            for path in self.path.glob(f".{name}.*.tmp"):
                path.unlink()
        for name in (".model", ".checkpoint-*"):
            for path in (*self.path.glob(f"{name}.unfinished"), *self.path.glob(f"{name}.old")):
                shutil.rmtree(path, ignore_errors=True)
        if self.overwrite and not self.resume:
            self._clear()

    def _check(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"output_dir {self.path}: is a file")
        if not self.path.exists():
            return
        self._take_lock()
        held = any((self.path / name).exists() for name in ("config.yaml", "result.json", JOURNAL))
        if (held or checkpoints(self.path)) and not (self.resume or self.overwrite):
            raise InputError(f"output_dir {self.path}: holds a run; choose another, or give --resume or --overwrite")

    def _take_lock(self) -> None:
        try:
            lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(lock, 200, 0).decode("utf-8", "replace").strip() or "it has not said who it is"
            os.close(lock)
            raise InputError(f"output_dir {self.path}: another run is writing there ({holder}); wait for it, or "
                             f"choose another folder") from None
        self._lock = lock
        try:
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except OSError as error:  # a full disk, for one
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(f"output_dir {self.path}: cannot be written ({error.strerror}); choose another, or make room")

    def _clear(self) -> None:
        """Take away an earlier run's own files, and nothing else that lies in the folder."""
        for path in [*self.path.glob("checkpoint-*"), self.path / "model"]:
            shutil.rmtree(path, ignore_errors=True)
        for name in OWN_FILES:
            (self.path / name).unlink(missing_ok=True)

    def last_checkpoint(self) -> str | None:
        """The newest checkpoint that is whole, where one is asked for; others are passed over."""
        found = reversed(checkpoints(self.path)) if self.resume else ()
        for path in found:
            if is_whole(path):
                return str(path)
            logger.warning("%s is not whole, an earlier one is taken", path)
        return None

    def require_same(self, settings: dict[str, Any]) -> None:
        """InputError naming the settings in which a run to be resumed differs from the one that began here.  More or
        fewer steps are the same run where the schedule does not depend on them."""
        if not self.resume:
            return
        if not (self.path / "config.yaml").exists():
            return  # it never came to write them, or they are lost: the checkpoint's own checks are left
        saved = read_yaml(self.path / "config.yaml")
        free = FREE | ({"steps"} if settings["lr_scheduler"] == "constant" else set())
        other = [name for name, value in settings.items() if name not in free and saved.get(name, value) != value]
        if other:
            there = ", ".join(f"{name} {shown(saved[name])} (not {settings[name]})" for name in other)
            raise InputError(f"output_dir {self.path}: its run has {there}; resume it as it began: "
                             f"zo train --config {self.path / 'config.yaml'} --resume")
