"""Reads regular files and writes files atomically, so that a file appears complete or not at all.

Knows paths and bytes, not what a file means.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compression.refusal import Refusal
from compression.storage.temporary_names import temporary_folder

__all__ = ["read_file", "read_lines", "refuse_irregular", "regular", "replace_file", "replacing"]

_ESCAPED = re.compile(r"[\ud800-\udfff]")  # what "surrogateescape" makes of a byte that is not UTF-8


def regular(path: str, flags: int) -> int:
    """Opens a regular file; an `opener` for `open`, which would wait for ever on a FIFO.

    Raises:
        OSError: the file cannot be opened, or is a folder, a FIFO, a socket or a device; it names the path.
    """
    handle = os.open(path, flags | os.O_NONBLOCK, 0o666)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, f"it is {_kind(mode)}, not a file", path)
    return handle


def read_file(path: Path, largest: int | None = None) -> bytes:
    """Returns the content of a regular file.

    Args:
        path: the file; a symbolic link is followed.
        largest: largest allowed size in bytes; None allows any size.

    Raises:
        OSError: as `regular`, or the file is larger than `largest`; it names the path.
    """
    with open(path, "rb", opener=regular) as file:
        content = file.read(-1 if largest is None else largest + 1)
    if largest is not None and len(content) > largest:
        raise OSError(errno.EFBIG, f"it is larger than {largest} bytes", str(path))
    return content


def read_lines(path: Path, longest: int | None = None) -> Iterator[tuple[int, str]]:
    """Yields the number, from 1, and the text of every line of a UTF-8 file; a byte order mark is skipped.

    Args:
        path: a regular file, see `regular`.
        longest: most characters of a line, its end included; None allows any number.

    Raises:
        Refusal: a line is longer or is not UTF-8; the message names file and line.
        OSError: as `regular`.
    """
    with open(path, encoding="utf-8-sig", errors="surrogateescape", opener=regular) as file:
        number = 0
        while line := file.readline(-1 if longest is None else longest + 1):
            number += 1
            if longest is not None and len(line) > longest:
                raise Refusal(f"{path}, line {number}: longer than {longest} characters")
            if not line.isascii() and _ESCAPED.search(line):
                raise Refusal(f"{path}, line {number}: must be UTF-8 text")
            yield number, line


def refuse_irregular(folder: Path, depth: int = 2) -> None:
    """Refuse a folder that holds anything but regular files and folders, on which a library that opens it would hang.

    Names that begin with a dot are not looked at: nothing here opens them.

    Args:
        folder: the folder; nothing happens if it is none.
        depth: number of levels of folders that are looked at.

    Raises:
        Refusal: one entry is a FIFO, a socket, a device, or a symbolic link that leads nowhere.
        OSError: a folder cannot be read.
    """
    if not depth or not folder.is_dir():
        return
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        try:
            mode = entry.stat().st_mode
        except FileNotFoundError:
            if not entry.is_symlink():
                continue  # another process has just removed it
            raise Refusal(
                f"cannot use {folder}: {entry.name} is a symbolic link to a file that does not exist"
            ) from None
        if stat.S_ISDIR(mode):
            refuse_irregular(entry, depth - 1)
        elif not stat.S_ISREG(mode):
            raise Refusal(f"cannot use {folder}: {entry.name} is {_kind(mode)}, not a file")


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"), (stat.S_ISDIR, "a folder"))
    return next((name for test, name in kinds if test(mode)), "a device")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yields an empty file in a temporary folder beside `target`, which replaces `target` unless an error occurs.

    The folder of `target` is created. After a crash at any point `target` has either its old or its new content.

    Raises:
        OSError: the disk is full or not writable.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(target.parent, target.name) as folder:
        temporary = folder / "unfinished"
        temporary.touch()
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)


def replace_file(target: Path, content: bytes | str) -> Path:
    """Write a file atomically, as `replacing` does; returns `target`.

    What UTF-8 cannot hold in a text, such as parts of a path that are no text, is written as escape sequences.
    """
    with replacing(target) as temporary:
        temporary.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
    return target
