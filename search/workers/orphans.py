"""Ends the processes that a killed search leaves behind.

If the process that started Ray gets SIGKILL, Ray's helpers may run on forever. A small watcher process therefore lists
the descendants of the search once a second and waits on a pipe, which the kernel closes when the search ends for any
reason; it then kills the descendants that are left and removes their folder. Works on Linux and does nothing elsewhere.
The watcher runs this file as a script, so the file imports nothing of this project.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["guarded_children"]

_DONE = b"done"
_GRACE = 5.0  # seconds that processes have to end by themselves
_PERIOD = 1.0  # seconds between two lists of descendants


@contextmanager
def guarded_children(folder: Path | None = None) -> Iterator[None]:
    """Processes started inside outlive this one by at most a few seconds, however it ends.

    Args:
        folder: removed after them if this process is killed.
    """
    if not Path("/proc/self/stat").exists():
        yield
        return
    command = [sys.executable, str(Path(__file__).resolve()), str(os.getpid()), str(folder or "")]
    # It gets its own session, so that Ctrl-C at the terminal does not reach it.
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert watcher.stdin is not None
    try:
        yield
    finally:
        with suppress(BrokenPipeError):  # the watcher was killed
            watcher.stdin.write(_DONE)
            watcher.stdin.close()
        watcher.wait()


class _Family:
    """The known descendants of a process. Start times distinguish them from later processes with the same number."""

    def __init__(self, root: int) -> None:
        self.root = root
        self.started: dict[int, int] = {}

    def refresh(self) -> None:
        """Add new descendants and drop those that have ended."""
        every = dict(_processes())
        self.started = {pid: start for pid, start in self.started.items() if pid in every and every[pid][1] == start}
        while fresh := {
            pid: start
            for pid, (parent, start) in every.items()
            if (parent == self.root or parent in self.started) and pid not in self.started and pid != os.getpid()
        }:
            self.started |= fresh

    def kill(self) -> None:
        """Kill all descendants that are left."""
        for pid in self.started:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def _processes() -> Iterator[tuple[int, tuple[int, int]]]:
    """Number, parent and start time of every running process; zombies are left out."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                state, parent, *rest = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
                if state != "Z":
                    yield int(entry.name), (int(parent), int(rest[17]))


def _watch(root: int, folder: str) -> None:
    family = _Family(root)
    while not select.select([sys.stdin], [], [], _PERIOD)[0]:
        family.refresh()
    if sys.stdin.buffer.read() == _DONE:
        return
    time.sleep(_GRACE)
    family.refresh()
    while family.started:
        family.kill()
        time.sleep(0.2)
        family.refresh()
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _watch(int(sys.argv[1]), sys.argv[2])
