"""Temporary files and folders that are recognised as leftovers once the process that made them has ended.

Everything unfinished is in a folder `.NAME.xxxxxxxx.tmp`, on which the process that made it holds a lock (`flock`). The
system releases the lock when the process ends for any reason, `kill -9` included; a folder whose lock can be taken
belongs to nobody and is removed. Knows names and locks; does not know what is written.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":  # there, nothing is locked, and nothing is taken for a leftover
    import fcntl

__all__ = ["is_temporary", "remove_leftovers", "temporary_folder"]

_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp", re.DOTALL)
_EARLIER = re.compile(
    r"\.(hf|dense|gguf-ready|unpack|download)-[a-z0-9_]{8}|[0-9a-f]{64}\.[0-9a-f]{32}\.(partial|damaged)"
    r"|(step-\d+|weights\.safetensors)\.partial"
)
"""Names that earlier versions gave to unfinished files, without a lock, and the name of a damaged cache file."""


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yields a new folder in `parent` that only this user can open; what is left of it at the end is removed.

    The body may move the folder, or files in it, to their final place in `parent`. Leftovers of the same name are
    removed first.

    Args:
        parent: an existing folder.
        name: what is written; shortened if it is long, as it becomes part of the folder's name.

    Raises:
        OSError: the disk is full or not writable.
    """
    short = name.encode()[:150].decode(errors="ignore")
    remove_leftovers(parent, short)
    folder, lock = _made(parent, short)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_leftovers(parent: Path, name: str | None = None, inside: bool = False) -> None:
    """Removes temporary files and folders that no living process owns. What cannot be removed stays, in silence.

    Args:
        parent: the folder to look in.
        name: remove only what `temporary_folder` made under this name.
        inside: `parent` belongs to Chisel: look in its subfolders too, remove also damaged cache files, and what
            earlier versions left under other names.
    """
    start = None if name is None else f".{name}."
    for here, folders, files in os.walk(parent):
        for entry in [*folders, *files]:
            known = is_temporary(entry) or (inside and _EARLIER.fullmatch(entry))
            if known and (start is None or entry.startswith(start)):
                _remove_unowned(Path(here, entry))
        folders[:] = [folder for folder in folders if inside and not is_temporary(folder)]


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name was made here and may be a leftover."""
    return _TEMPORARY.fullmatch(name) is not None


def _made(parent: Path, name: str) -> tuple[Path, int | None]:
    """A new folder and the open lock on it; another process may have taken it for a leftover before it was locked."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=f".{name}.", suffix=".tmp"))
        if sys.platform == "win32":
            return folder, None
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            try:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(lock, fcntl.LOCK_EX)
                if os.path.samestat(os.fstat(lock), folder.stat()):
                    return folder, lock
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)


def _remove_unowned(path: Path) -> None:
    if sys.platform == "win32":
        return
    with suppress(OSError):
        lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            found = os.fstat(lock)
            if found.st_uid != os.geteuid():
                return
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if stat.S_ISDIR(found.st_mode):
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        finally:
            os.close(lock)
