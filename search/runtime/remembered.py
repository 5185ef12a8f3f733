"""Remembers what takes seconds to compute between processes: digests of large files, and answers to yes-no questions.

The digest of a file is computed once for as long as the file does not change.

A file counts as unchanged while its path, size, inode and times of modification and of change are the same. The latter
cannot be set by a program, so that a file which is rewritten and given its old time again is noticed too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from compression.refusal import Refusal
from compression.storage.strict_json import json_digest, read_object
from search.runtime.errors import DataUnavailable
from search.runtime.files import cache_folder, file_digest, write_whole

__all__ = ["SMALL", "Stamp", "remembered_answer", "remembered_digest"]

SMALL = 1 << 26
"""Files of fewer bytes together are digested anew, which takes a fraction of a second."""
_SLOW = 0.25  # seconds; what takes less is computed anew
_RECENT = 2_000_000_000  # nanoseconds within which a file may change without a change of its times


@dataclass(frozen=True)
class Stamp:
    """What tells whether files have changed: path, size, inode, device and times in nanoseconds of each."""

    files: tuple[tuple[str, int, int, int, int, int], ...]

    @classmethod
    def of(cls, paths: Sequence[Path]) -> Stamp:
        """The stamp of files as they are now. Raises OSError if one is missing."""
        found = []
        for path in sorted(path.resolve() for path in paths):
            at = path.stat()
            found.append((str(path), at.st_size, at.st_ino, at.st_dev, at.st_mtime_ns, at.st_ctime_ns))
        return cls(tuple(found))

    def remembered(self, what: str, compute: Callable[[], str]) -> str:
        """The digest that `compute` gives; from an earlier call, if there was one for the same files and `what`.

        It is stored only if the files are large and have not changed since this stamp was taken.

        Args:
            what: everything besides the files that determines the digest.
            compute: returns the digest, 64 hexadecimal digits.
        """
        if (found := self._place(what)) is None:
            return compute()
        place, key = found
        if (known := _read(place, key)) is not None:
            return known
        digest, newest = compute(), max(moment for file in self.files for moment in file[4:])
        with suppress(OSError):  # a digest that cannot be stored is computed again
            if time.time_ns() - newest > _RECENT and Stamp.of([Path(file[0]) for file in self.files]) == self:
                _write(place, key, digest)
        return digest

    def known(self, what: str) -> str | None:
        """The digest that an earlier call of `remembered` has stored; None if there is none."""
        found = self._place(what)
        return None if found is None else _read(*found)

    def _place(self, what: str) -> tuple[Path, str] | None:
        """The file of a digest and its key; None if the files are small or the cache cannot be used."""
        if sum(file[1] for file in self.files) < SMALL:
            return None
        key = json_digest({"what": what, "files": self.files})
        try:
            return cache_folder() / "digests" / key[:2] / f"{key}.json", key
        except DataUnavailable:
            return None


def remembered_digest(path: Path) -> str:
    """The sha256 of a file in hexadecimal, remembered if the file is large. Raises OSError as `file_digest`."""
    return Stamp.of([path]).remembered("sha256", lambda: file_digest(path))


def remembered_answer(question: Mapping[str, object], compute: Callable[[], bool]) -> bool:
    """The answer that `compute` gives; that of an earlier process, if it took it a quarter of a second or more.

    Args:
        question: all that determines the answer, as values of JSON.
    """
    key = json_digest(question)
    answers = {json_digest([key, answer]): answer for answer in (True, False)}
    try:
        place = cache_folder() / "answers" / key[:2] / f"{key}.json"
    except DataUnavailable:
        return compute()
    if (known := answers.get(_read(place, key) or "")) is not None:
        return known
    started = time.monotonic()
    answer = compute()
    if time.monotonic() - started >= _SLOW:
        with suppress(OSError):
            _write(place, key, json_digest([key, answer]))
    return answer


def _write(place: Path, key: str, digest: str) -> None:
    write_whole(place, json.dumps({"key": key, "digest": digest, "sha256": json_digest([key, digest])}))


def _read(place: Path, key: str) -> str | None:
    """The digest in a file; None if there is none, or if the file is damaged or belongs to another key."""
    try:
        content = read_object(place, "the digest")
    except Refusal:
        return None
    digest = content.get("digest")
    if content.get("key") != key or not isinstance(digest, str):
        return None
    return digest if content.get("sha256") == json_digest([key, digest]) else None
