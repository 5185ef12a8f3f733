"""Guardian: a small process that outlives a killed one and ends what that has started and could not end any more.

Ray's own helpers may go on for ever when the process that started them gets SIGKILL. The guardian looks once a second
which processes descend from this one, and waits on a pipe that the kernel closes when this one is gone, however it
went; then it kills what is left of them. Linux; elsewhere it does nothing. Run as a script it imports nothing of this
project.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["guarded_children"]

_DONE = b"done"
_GRACE = 5.0  # seconds in which processes may end by themselves
_PERIOD = 1.0  # seconds between two looks


@contextmanager
def guarded_children() -> Iterator[None]:
    """Processes started inside do not outlive this one by more than some seconds, whatever becomes of it."""
    if not Path("/proc/self/stat").exists():
        yield
        return
    command = [sys.executable, str(Path(__file__).resolve()), str(os.getpid())]
    # A session of its own: a Ctrl-C at the terminal is not meant for it.
    guardian = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert guardian.stdin is not None
    try:
        yield
    finally:
        with suppress(BrokenPipeError):  # somebody has killed the guardian
            guardian.stdin.write(_DONE)
            guardian.stdin.close()
        guardian.wait()


class _Family:
    """Processes that descend from one, as far as they were seen: their start times tell them from later namesakes."""

    def __init__(self, root: int) -> None:
        self.root = root
        self.started: dict[int, int] = {}

    def repeat(self) -> None:
        """Take in who has come, and let go of who is gone."""
        every = dict(_processes())
        self.started = {pid: start for pid, start in self.started.items() if pid in every and every[pid][1] == start}
        while fresh := {
            pid: start
            for pid, (parent, start) in every.items()
            if (parent == self.root or parent in self.started) and pid not in self.started and pid != os.getpid()
        }:
            self.started |= fresh

    def kill(self) -> None:
        """Everyone who is left."""
        for pid in self.started:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def _processes() -> Iterator[tuple[int, tuple[int, int]]]:
    """Number, parent and start time of every process that runs; one that waits to be counted does not."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                state, parent, *rest = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
                if state != "Z":
                    yield int(entry.name), (int(parent), int(rest[17]))


def _watch(root: int) -> None:
    family = _Family(root)
    while not select.select([sys.stdin], [], [], _PERIOD)[0]:
        family.repeat()
    if sys.stdin.buffer.read() == _DONE:
        return
    time.sleep(_GRACE)
    family.repeat()
    while family.started:
        family.kill()
        time.sleep(0.2)
        family.repeat()


if __name__ == "__main__":
    _watch(int(sys.argv[1]))
