"""Lets one process of a machine make a file while others wait for it.

Knows lock files; does not know what is made. The kernel frees the lock of a process that ends in any way, also by
`kill -9`, and the last holder removes the file.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["exclusive"]


@contextmanager
def exclusive(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the lock of a lock file, which is created with its folder if it is missing.

    On a file system without locks it holds nothing. It must not be entered twice by the same thread for one path.

    Args:
        path: the lock file.
        waiting: called once before waiting for another process or thread that holds the lock.

    Raises:
        OSError: the file cannot be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _locked(path, waiting)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # before the lock is freed, so that nobody else has a lock on this file
        os.close(descriptor)


def _locked(path: Path, waiting: Callable[[], None]) -> int:
    """Returns the descriptor of the locked file."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if _taken(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                waiting()
                waiting = _silently
                _taken(descriptor, fcntl.LOCK_EX)
            if _is_at(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the holder removed the file while this process waited for it


def _taken(descriptor: int, how: int) -> bool:
    """Locks a file; returns whether somebody else holds the lock."""
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    return False


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _silently() -> None:
    return
