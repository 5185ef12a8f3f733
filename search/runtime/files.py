"""Files written whole, their digests, and where caches live."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from search.runtime.errors import DataUnavailable
from search.runtime.signals import shield

__all__ = ["cache_folder", "file_digest", "finite", "unwritable", "write_whole"]


def write_whole(target: Path, content: bytes | str) -> Path:
    """Write a file whole, making its folder: after a crash at any point it has either its old or its new content."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with shield():
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return target


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
    return DataUnavailable(f"cannot write {folder} ({error.strerror}); name another folder in CHISEL_CACHE")
