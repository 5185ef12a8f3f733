"""Writes files atomically: a file appears complete or not at all. Knows paths and bytes, not what a file means."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replace_file", "replacing"]


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yields a temporary file in the folder of `target`, which replaces `target` at the end or is removed on an error.

    After a crash at any point `target` has either its old or its new content.

    Raises:
        OSError: the disk is full or not writable.
    """
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:40]}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_file(target: Path, content: bytes | str) -> Path:
    """Write a file atomically, as `replacing` does, and create its folder; returns `target`.

    What UTF-8 cannot hold in a text, such as parts of a path that are no text, is written as escape sequences.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        temporary.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
    return target
