"""Writes files atomically, computes their digests, and locates the cache folder."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from compression.refusal import Refusal
from compression.storage.temporary_names import remove_leftovers
from compression.storage.whole_files import regular, replace_file
from search.runtime.errors import DataUnavailable
from search.runtime.signals import shield

__all__ = ["cache_folder", "file_digest", "finite", "is_text", "unwritable", "user_path", "write_whole"]


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
    given = os.environ.get("CHISEL_CACHE") or "~/.cache/chisel"
    try:
        folder = Path(given).expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
    except RuntimeError as error:  # this user has no home: neither HOME nor an entry in the list of users
        raise DataUnavailable(f"cannot find the folder {given} ({error}); name a folder in CHISEL_CACHE") from error
    except OSError as error:
        raise unwritable(folder, error) from error
    _clean(folder)
    return folder


@lru_cache
def _clean(folder: Path) -> None:
    remove_leftovers(folder, inside=True)
    remove_leftovers(Path(tempfile.gettempdir()), "chisel")


def is_text(value: str) -> bool:
    """Whether a text holds whole characters only; a word of a command line may hold bytes that are none."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def user_path(text: str) -> Path:
    """Return a path that a user gave, with ~ and ~USER expanded; a user without a home has no such path.

    Raises:
        Refusal: there is no such home.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise Refusal(f"cannot find the folder {text!r}: {error}; give the whole path") from None


def file_digest(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    with open(path, "rb", opener=regular) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unwritable(folder: Path, error: OSError) -> DataUnavailable:
    """Return the exception to raise for a cache folder that cannot be written."""
    return DataUnavailable(f"cannot write {folder} ({error.strerror}); name another folder in CHISEL_CACHE")
