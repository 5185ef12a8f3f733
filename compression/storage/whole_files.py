"""Writes files atomically: a file appears complete or not at all. Knows paths and bytes, not what a file means."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compression.storage.temporary_names import temporary_folder

__all__ = ["replace_file", "replacing"]


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yields an empty file in a temporary folder beside `target`, which replaces `target` unless an error occurs.

    After a crash at any point `target` has either its old or its new content.

    Raises:
        OSError: the disk is full or not writable.
    """
    with temporary_folder(target.parent, target.name) as folder:
        temporary = folder / "unfinished"
        temporary.touch()
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)


def replace_file(target: Path, content: bytes | str) -> Path:
    """Write a file atomically, as `replacing` does, and create its folder; returns `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return target
