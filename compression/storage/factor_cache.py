"""Caches named tensors on disk under keys derived from content, shared by all processes of a machine.

Knows safetensors files and checksums; does not know what the tensors mean. Files are memory-mapped, so evaluators share
the page cache and slicing copies nothing. A file that does not match the checksum in its name is set aside and rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import uuid
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from compression.refusal import Refusal
from compression.storage.exclusive import exclusive
from compression.storage.tensor_files import new_tensor_file

__all__ = ["Bundle", "FactorCache", "cache_key"]


@dataclass(frozen=True, eq=False)
class Bundle:
    """Holds named tensors with text metadata, the unit of the cache."""

    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


def cache_key(**parts: object) -> str:
    """Returns the SHA-256 of the canonical JSON of all that determines a cached value, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class FactorCache:
    """Stores bundles by key below `root`. One process makes or mends a file, and others wait for it.

    Args:
        root: folder of the cache, created on first use; None stores nothing on disk.
        warn: called with a message for every damaged file; the default issues a Python warning.
    """

    def __init__(self, root: Path | None, warn: Callable[[str], None] = warnings.warn) -> None:
        self.root = root
        self._tell = warn
        self._waited = False

    def get_or_build(self, key: str, build: Callable[[], Bundle]) -> Bundle:
        """Returns the bundle of `key`: from disk if an intact file exists, else built and stored.

        If another process is building it, this one says so once, waits and takes the other's. `build` may use other
        keys of the cache, but not this one.

        Raises:
            OSError: the disk is full or not writable; no partial file is left.
        """
        if self.root is None:
            return build()
        bundle, _ = self._find(key)
        if bundle is not None:
            return bundle
        with self._alone(key):
            bundle = self._mend(key)  # another process may have made it in the meantime
            if bundle is None:
                bundle = build()
                self.store(key, bundle)
                bundle = self._mend(key) or bundle  # memory-mapped from here on
            return bundle

    def has(self, key: str) -> bool:
        """Whether a file of `key` exists. Only `load` checks that it is intact."""
        return self.root is not None and any(self._folder(key).glob(f"{key}.*.safetensors"))

    def load(self, key: str) -> Bundle | None:
        """Returns the bundle of `key`, or None if it is not cached.

        A damaged file counts as not cached; it is renamed, so it is reported only once.
        """
        if self.root is None:
            return None
        bundle, damaged = self._find(key)
        if damaged:
            with self._alone(key):
                bundle = self._mend(key)
        return bundle

    def store(self, key: str, bundle: Bundle) -> None:
        """Write the bundle of `key`; the complete file appears at once, or no file does."""
        if self.root is None:
            return
        folder = self._folder(key)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{key}.{uuid.uuid4().hex}.partial"
        with new_tensor_file(partial, bundle.tensors, dict(bundle.metadata)):
            partial.replace(folder / f"{key}.{_digest(partial)}.safetensors")

    def _find(self, key: str) -> tuple[Bundle | None, list[Path]]:
        """Returns the bundle of `key`, or None, and the damaged files that were found before it."""
        damaged: list[Path] = []
        for path in sorted(self._folder(key).glob(f"{key}.*.safetensors")):
            try:
                return _read(path), damaged
            except (ValueError, SafetensorError):
                damaged.append(path)
            except FileNotFoundError:  # another process has just set it aside
                continue
        return None, damaged

    def _mend(self, key: str) -> Bundle | None:
        """Sets damaged files of `key` aside; returns its bundle, or None. The caller must hold the lock of `key`."""
        bundle, damaged = self._find(key)
        for path in damaged:
            self._tell(f"cache file {path.name} is damaged; set aside and rebuilt")
            path.replace(path.with_suffix(".damaged"))
        return bundle

    def _alone(self, key: str) -> AbstractContextManager[None]:
        """The lock of `key`: one process makes or mends its file, and the others wait for it."""
        return exclusive(self._folder(key) / f"{key}.lock", self._say_waiting)

    def _say_waiting(self) -> None:
        if not self._waited:
            self._waited = True
            self._tell("another process is making statistics or factors that this one needs; waiting for them")

    def _folder(self, key: str) -> Path:
        assert self.root is not None
        return self.root / key[:2]


def _read(path: Path) -> Bundle:
    """Read a file; raises ValueError if its checksum differs, SafetensorError if it is not a safetensors file."""
    if _digest(path) != path.name.split(".")[1]:
        raise Refusal("its checksum differs")
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return Bundle(tensors, file.metadata() or {})


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
