"""Folders whose file "sha256" lists every file with its digest, so that a damaged one is noticed. Knows no models."""

from __future__ import annotations

from pathlib import Path

from search.runtime.files import file_digest, write_whole
from search.runtime.remembered import remembered_digest

__all__ = ["intact", "write_digests"]


def write_digests(folder: Path) -> None:
    """Write the sha256 and name of every file in a folder into its file "sha256", one file a line."""
    files = sorted(path for path in folder.iterdir() if path.name != "sha256")
    write_whole(folder / "sha256", "".join(f"{file_digest(path)}  {path.name}\n" for path in files))


def intact(folder: Path) -> bool:
    """Whether a folder holds the files that `write_digests` listed and no others. Lists those of an earlier version."""
    try:
        text = (folder / "sha256").read_text(encoding="utf-8")
        if "  " not in text and text == remembered_digest(
            folder / "model.safetensors"
        ):  # earlier versions wrote no more
            write_digests(folder)
            return True
        listed = {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}
        files = {path.name: path for path in folder.iterdir() if path.name != "sha256"}
        return files.keys() == listed.keys() and all(remembered_digest(files[name]) == listed[name] for name in listed)
    except (FileNotFoundError, UnicodeDecodeError):
        return False
