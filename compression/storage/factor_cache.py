"""Caches named tensors on disk under keys derived from content, shared by all processes of a machine.

Knows safetensors files and checksums; does not know what the tensors mean. Files are memory-mapped, so evaluators share
the page cache and slicing copies nothing. A file holds its key, so that its name alone proves nothing: a file that does
not match the checksum in its name, or that holds another key than its name says, is set aside and rebuilt. Files of
earlier versions hold no key; they count as not cached and are removed when their value is made again.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open

from compression.refusal import Refusal
from compression.storage.exclusive import exclusive
from compression.storage.strict_json import json_digest
from compression.storage.tensor_files import new_tensor_file

__all__ = ["Bundle", "FactorCache", "cache_key"]

_OWN = "chisel."
"""Prefix of the entries that the cache itself adds to the metadata of a file."""
_KEY = f"{_OWN}key"


@dataclass(frozen=True, eq=False)
class Bundle:
    """Holds named tensors with text metadata, the unit of the cache."""

    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


def cache_key(**parts: object) -> str:
    """Returns the SHA-256 of the canonical JSON of all that determines a cached value, 64 hexadecimal digits."""
    return json_digest(parts)


class FactorCache:
    """Stores bundles by key below `root`. One process makes or mends a file, and others wait for it.

    Args:
        root: folder of the cache, created on first use; None stores nothing on disk.
        warn: called with a message for every damaged file; the default issues a Python warning.
        made_for: what all values of this cache are made for besides what their keys cover, by name. It is written into
            every file, and files that were made for something else are passed over.
    """

    def __init__(
        self,
        root: Path | None,
        warn: Callable[[str], None] = warnings.warn,
        made_for: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.root = root
        self._tell = warn
        self._waited = False
        self._made_for = {f"{_OWN}{name}": value for name, value in made_for.items()}

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
                if (path := self.store(key, bundle)) is not None:
                    bundle = Bundle(_mapped(path).tensors, bundle.metadata)  # memory-mapped from here on
            return bundle

    def has(self, key: str) -> bool:
        """Whether a file of `key` exists. Only `load` checks that it is intact."""
        return self.root is not None and any(
            self._fits(path) for path in self._folder(key).glob(f"{key}.*.safetensors")
        )

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

    def store(self, key: str, bundle: Bundle) -> Path | None:
        """Write the bundle of `key`; the complete file appears at once, or no file does.

        Returns:
            The file; None if nothing is stored on disk.
        """
        if self.root is None:
            return None
        folder = self._folder(key)
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {**bundle.metadata, _KEY: key, **self._made_for}
        with new_tensor_file(folder / key, bundle.tensors, metadata) as partial:
            written = partial.replace(folder / f"{key}.{_digest(partial)}.safetensors")
        for path in folder.glob(f"{key}.*.safetensors"):
            header = _header(path)
            if header is not None and _KEY not in header:
                path.unlink(missing_ok=True)
        return written

    def replace(self, key: str, bundle: Bundle) -> None:
        """Write another bundle of `key` and remove the earlier ones; one of them is complete at any time."""
        if self.root is None:
            return
        earlier = list(self._folder(key).glob(f"{key}.*.safetensors"))
        written = self.store(key, bundle)
        for path in earlier:
            if path != written:
                path.unlink(missing_ok=True)

    def drop(self, key: str) -> None:
        """Remove the bundle of `key`. Who has it mapped keeps it."""
        if self.root is not None:
            for path in self._folder(key).glob(f"{key}.*.safetensors"):
                path.unlink(missing_ok=True)

    def metadata(self, key: str) -> Mapping[str, str]:
        """The metadata of the bundle of `key` without checking it; empty if it is not cached."""
        for path in self._folder(key).glob(f"{key}.*.safetensors") if self.root is not None else ():
            if self._fits(path):
                return _header(path) or {}
        return {}

    def _find(self, key: str) -> tuple[Bundle | None, list[Path]]:
        """Returns the bundle of `key`, or None, and the damaged files that were found before it."""
        damaged: list[Path] = []
        for path in sorted(self._folder(key).glob(f"{key}.*.safetensors")):
            try:
                bundle = _read(path)
                own = {name: value for name, value in bundle.metadata.items() if name.startswith(_OWN)}
                if own.get(_KEY, key) != key:
                    raise Refusal("it was stored under another key")
            except (ValueError, SafetensorError):
                damaged.append(path)
                continue
            except FileNotFoundError:  # another process has just set it aside
                continue
            if _KEY in own and _agree(own, self._made_for):
                rest = {name: value for name, value in bundle.metadata.items() if name not in own}
                return Bundle(bundle.tensors, rest), damaged
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

    def _fits(self, path: Path) -> bool:
        """Whether a file is for what this cache is for, according to its header."""
        header = _header(path)
        return header is None or (_KEY in header and _agree(header, self._made_for))

    def _folder(self, key: str) -> Path:
        assert self.root is not None
        return self.root / key[:2]


def _agree(found: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether the entries that both have are equal."""
    return all(found.get(name, value) == value for name, value in wanted.items())


def _header(path: Path) -> Mapping[str, str] | None:
    """The metadata of a file; None if it is damaged or gone, which is for `load` to find out."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return None


def _read(path: Path) -> Bundle:
    """Read a file; raises ValueError if its checksum differs, SafetensorError if it is not a safetensors file."""
    if _digest(path) != path.name.split(".")[1]:
        raise Refusal("its checksum differs")
    return _mapped(path)


def _mapped(path: Path) -> Bundle:
    """The content of a file, memory-mapped, without a look at its checksum."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return Bundle(tensors, file.metadata() or {})


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
