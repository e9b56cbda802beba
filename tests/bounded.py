"""Reading under guard: so much memory, so much time of the processor, and a folder that is left as it was."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 10  # of the processor, for one input; the slowest known takes .2
MEMORY = 1 << 30  # bytes that reading one input may add to the process: its address space is limited


class Hang(BaseException):
    pass


@contextmanager
def bounded(memory: int = MEMORY) -> Iterator[None]:
    """Hang after so much time; MemoryError, or an end of the process, for more memory than is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])

    def stop(*_: object) -> None:
        raise Hang(f"still reading after {SECONDS} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def contents(folder: Path) -> dict[str, bytes]:
    """Path in the folder -> bytes, of every regular file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
