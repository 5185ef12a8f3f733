"""Writes files atomically, computes their digests, and locates the cache folder."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from compression.storage.temporary_names import remove_leftovers
from compression.storage.whole_files import replace_file
from search.runtime.errors import DataUnavailable
from search.runtime.signals import shield

__all__ = ["cache_folder", "file_digest", "finite", "unwritable", "write_whole"]


def write_whole(target: Path, content: bytes | str) -> Path:
    """Write a file atomically and create its folder (see `replace_file`); an interrupt waits until it is written.

    Returns:
        `target`.
    """
    with shield():
        return replace_file(target, content)


def finite(value: object) -> object:
    """Return the value with every NaN or infinite float, at any depth, replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def cache_folder() -> Path:
    """Return the user's cache folder, which is created if it is missing: CHISEL_CACHE, or ~/.cache/chisel.

    The first call in a process removes what killed processes have left in it and in the system's temporary folder.

    Raises:
        DataUnavailable: the folder cannot be created.
    """
    folder = Path(os.environ.get("CHISEL_CACHE") or "~/.cache/chisel").expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    _clean(folder)
    return folder


@lru_cache
def _clean(folder: Path) -> None:
    remove_leftovers(folder, inside=True)
    remove_leftovers(Path(tempfile.gettempdir()), "chisel")


def file_digest(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unwritable(folder: Path, error: OSError) -> DataUnavailable:
    """Return the exception to raise for a cache folder that cannot be written."""
    return DataUnavailable(f"cannot write {folder} ({error.strerror}); name another folder in CHISEL_CACHE")
