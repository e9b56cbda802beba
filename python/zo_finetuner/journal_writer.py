"""Appending to a journal: every record is with the operating system when `append` returns, and on the disk within
`SYNC_SECONDS` (a thread calls fsync, which may take tens of milliseconds; nobody waits for it but `sync` and `close`).

So a killed process loses nothing that was appended, and a machine that loses power the last seconds.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
import zlib
from pathlib import Path

from zo_finetuner.errors import InputError
from zo_finetuner.journal import Header, read_journal

SYNC_SECONDS = 5.0


class JournalWriter:
    """A new journal of this header.  InputError where the file is there already or cannot be made."""

    def __init__(self, path: Path, header: Header):
        self._open(path, os.O_CREAT | os.O_EXCL)
        self._write(header.to_bytes())
        self._start()

    @classmethod
    def reopen(cls, path: Path, step: int) -> tuple[JournalWriter, Header]:
        """Go on with a journal at a step: later records, and what a crash has torn, are cut off.  InputError where it
        does not reach that step."""
        journal = read_journal(path)
        kept = len(journal.upto(step))
        writer = cls.__new__(cls)
        writer._open(path, 0)
        try:
            os.ftruncate(writer._file, journal.start + kept * journal.header.record.size)
        except OSError as error:
            raise InputError(f"{path}: cannot be cut to step {step} ({error.strerror})") from None
        writer._start()
        return writer, journal.header

    def _open(self, path: Path, flags: int) -> None:
        self.path = path
        self._failure: OSError | None = None
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | flags, 0o666)
        except FileExistsError:
            raise InputError(f"{path}: is there already; choose another journal, or go on with that run") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be opened for the journal ({error.strerror})") from None

    def _start(self) -> None:
        self._dirty, self._stop, self._syncing = True, threading.Event(), threading.Lock()
        # Neither the thread nor what runs when the writer is forgotten, or the program ends, keeps the writer alive.
        self._end = weakref.finalize(self, _finish, self._file, self._stop)
        threading.Thread(
            target=_sync_now_and_then, args=(weakref.ref(self), self._stop), name="zo-journal", daemon=True
        ).start()

    def append(self, record: bytes) -> None:
        """A record without its checksum.  InputError where the disk takes it no more; the file then ends in what the
        reader takes for a torn record, and nothing follows it."""
        if self._failure is not None:
            raise self._told(self._failure)
        self._write(record + zlib.crc32(record).to_bytes(4, "little"))
        self._dirty = True

    def sync(self) -> None:
        """Everything on the disk; waits for it."""
        with self._syncing:  # who comes while the thread is at it waits for the same end
            if self._dirty:
                self._dirty = False
                try:
                    os.fsync(self._file)
                except OSError as error:
                    self._failure = error
        if self._failure is not None:
            raise self._told(self._failure)

    def close(self) -> None:
        """`sync`, and nothing can be appended any more.  Closing again does nothing."""
        if self._end.alive:
            try:
                self.sync()
            finally:
                self._end()

    def _write(self, content: bytes) -> None:
        try:
            while content:
                content = content[os.write(self._file, content) :]
        except OSError as error:
            self._failure = error
            raise self._told(error) from None

    def _told(self, error: OSError) -> InputError:
        return InputError(f"{self.path}: the journal cannot be written ({error.strerror}); make room, then --resume")


def _sync_now_and_then(writer: weakref.ref[JournalWriter], stop: threading.Event) -> None:
    while not stop.wait(SYNC_SECONDS):
        alive = writer()
        if alive is None:
            return
        with contextlib.suppress(InputError):  # kept, and told at the next `append`
            alive.sync()
        del alive


def _finish(file: int, stop: threading.Event) -> None:
    stop.set()
    with contextlib.suppress(OSError):
        os.close(file)
