"""Folders whose file "sha256" lists every file with its digest, so that a damaged one is noticed. Knows no models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from compression.storage.temporary_names import temporary_folder
from search.runtime.files import file_digest, write_whole
from search.runtime.remembered import remembered_digest

__all__ = ["made_once"]


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, made if it is missing, if a file no longer has its digest, or if another file was added.

    One process makes it, and others wait; it gets its name when it is complete.

    Args:
        make: writes the files into the new folder that it is given.

    Raises:
        OSError: the folder around it cannot be written.
    """
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.parent / ".lock"):
        if not _intact(folder):
            shutil.rmtree(folder, ignore_errors=True)
            with temporary_folder(folder.parent, "unpack") as temporary:
                made = temporary / "made"
                made.mkdir()
                make(made)
                _write_digests(made)
                made.rename(folder)
    return folder


def _write_digests(folder: Path) -> None:
    """Write the sha256 and name of every file in a folder into its file "sha256", one file a line."""
    files = sorted(path for path in folder.iterdir() if path.name != "sha256")
    write_whole(folder / "sha256", "".join(f"{file_digest(path)}  {path.name}\n" for path in files))


def _intact(folder: Path) -> bool:
    """Whether a folder holds the files that are listed in it and no others. Lists those of an earlier version."""
    try:
        text = (folder / "sha256").read_text(encoding="utf-8")
        is_digest = "  " not in text  # all that earlier versions wrote
        if is_digest and text == remembered_digest(folder / "model.safetensors"):
            _write_digests(folder)
            return True
        listed = {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}
        files = {path.name: path for path in folder.iterdir() if path.name != "sha256"}
        return files.keys() == listed.keys() and all(remembered_digest(files[name]) == listed[name] for name in listed)
    except (FileNotFoundError, UnicodeDecodeError):
        return False
