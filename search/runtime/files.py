"""Files written whole, their digests, and where caches live."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path

from compression.storage.whole_files import replace_file
from search.runtime.errors import DataUnavailable
from search.runtime.signals import shield

__all__ = ["cache_folder", "file_digest", "finite", "unwritable", "write_whole"]


def write_whole(target: Path, content: bytes | str) -> Path:
    """Write a file whole and make its folder, see `replace_file`; an interrupt waits until the file is written."""
    with shield():
        return replace_file(target, content)


def finite(value: object) -> object:
    """The same value with every NaN or infinite float, at any depth, replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def cache_folder() -> Path:
    """The user's cache, made if missing.

    Raises:
        DataUnavailable: it cannot be made.
    """
    folder = Path(os.environ.get("CHISEL_CACHE") or "~/.cache/chisel").expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    return folder


def file_digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unwritable(folder: Path, error: OSError) -> DataUnavailable:
    """What to raise for a cache folder that cannot be written."""
    return DataUnavailable(f"cannot write {folder} ({error.strerror}); name another folder in CHISEL_CACHE")
