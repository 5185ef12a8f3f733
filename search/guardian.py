"""Guardian: a small process that outlives a killed one and ends what that has started and could not end any more.

Ray's own helpers may go on for ever when the process that started them gets SIGKILL. Whatever is started inside
`guarded_children` inherits a mark in its environment; the guardian waits on a pipe that the kernel closes when this
process is gone, however it went, and then kills what has the mark. Linux; elsewhere it does nothing. Run as a script it
imports nothing of this project.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["guarded_children"]

_MARK = "CHISEL_GUARDED"
_GRACE = 5.0  # seconds in which processes may end by themselves
_DONE = b"done"


@contextmanager
def guarded_children() -> Iterator[None]:
    """Processes started inside do not outlive this one by more than some seconds, whatever becomes of it."""
    if not Path("/proc/self/environ").exists():
        yield
        return
    mark = uuid.uuid4().hex
    command = [sys.executable, str(Path(__file__).resolve()), mark]
    # A session of its own: a Ctrl-C at the terminal is not meant for it.
    guardian = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert guardian.stdin is not None
    before = os.environ.get(_MARK)
    os.environ[_MARK] = mark
    try:
        yield
    finally:
        if before is None:
            del os.environ[_MARK]
        else:
            os.environ[_MARK] = before
        with suppress(BrokenPipeError):  # somebody has killed the guardian
            guardian.stdin.write(_DONE)
            guardian.stdin.close()
        guardian.wait()


def _marked(mark: str) -> list[int]:
    """Processes of ours that have the mark."""
    wanted, found = f"{_MARK}={mark}".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def _watch(mark: str) -> None:
    if sys.stdin.buffer.read() == _DONE:
        return
    time.sleep(_GRACE)
    while left := _marked(mark):
        for process in left:
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.2)


if __name__ == "__main__":
    _watch(sys.argv[1])
