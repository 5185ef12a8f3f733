"""Manages run folders: a lock for one owner at a time, and files that are complete or absent.

Takes plain values and writes them. Knows no models, no trials and no agents.
"""

from __future__ import annotations

import json
import os
import re
import socket
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

from compression.refusal import Refusal
from compression.storage.strict_json import bounded_text
from compression.storage.temporary_names import is_temporary, remove_leftovers
from search.runtime.files import finite, write_whole
from search.runtime.provenance import now

__all__ = [
    "CONFIG",
    "DIGEST",
    "ENVIRONMENT",
    "LOG",
    "PRIOR",
    "RESULTS",
    "SCORES",
    "STAGES",
    "STUDY",
    "SUMMARY",
    "TABLE",
    "TRIALS",
    "RunFolder",
    "contents",
    "holding",
    "refuse_held",
    "refuse_unwritable",
    "refuse_used",
]

CONFIG = "config.json"
DIGEST = "digest.json"
ENVIRONMENT = "environment.json"
PRIOR = "prior.json"
SCORES = "scores.json"
STAGES = "stages.csv"
STUDY = "study.db"
SUMMARY = "summary.json"
LOG = "run.log"
TABLE = "summary.csv"
TRIALS = "trials.csv"

RESULTS = Path("results")
_INSIDE = 160  # bytes of the longest path inside a run folder
_LOCK = ".lock"
_HOLDER = ".holder.json"


class RunFolder:
    """The locked folder of a run or a healing. Use it as a context manager; leaving it releases the lock.

    For a run, call `RunFolder.open`, `RunFolder.new` or `RunFolder.resume`.

    Attributes:
        path: path of the folder; created if missing.

    Raises:
        ValueError: the folder cannot be created or written, or another process, which the message names, uses it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = _locked(path)
        remove_leftovers(path, inside=True)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now()}
        try:
            self.write_json(_HOLDER, holder)
        except BaseException:
            self._lock.release()
            raise

    @classmethod
    def new(cls, out: str | None, agent: str, model: str, seed: int) -> Self:
        """Create the folder of a new run.

        Args:
            out: path of the folder; created if missing, refused unless empty. None creates
                results/<date>-<agent>-<model>-<seed> in the working directory, with a number appended if that exists.

        Raises:
            ValueError: `out` is not a folder, not empty, not writable, or in use by another process, which is named.
        """
        if out is not None:
            path = Path(out).absolute()
        else:
            stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name or model).strip("-.")[:60] or "model"
            name = f"{datetime.now():%Y%m%d-%H%M%S}-{agent}-{stem}-{seed}"
            path = RESULTS.absolute() / name
            while path.exists():
                path = path.with_name(f"{name}-{1 + int(path.name[len(name) + 1 :] or 1)}")
        refuse_used(path)
        return cls(path)

    @classmethod
    def resume(cls, run: str) -> Self:
        """Open the folder of an earlier run to continue it.

        Raises:
            ValueError: there is no such folder, it has no config.json, is not writable, or is in use by another
                process, which is named.
        """
        path = Path(run).absolute()
        if not (path / CONFIG).is_file():
            raise Refusal(f"resume must be the folder of an earlier run, but {path / CONFIG} does not exist")
        return cls(path)

    @classmethod
    def open(cls, resume: str | None, out: str | None, agent: str, model: str, seed: int) -> Self:
        """Call `RunFolder.resume` if `resume` names an earlier run, else `RunFolder.new`."""
        return cls.resume(resume) if resume else cls.new(out, agent, model, seed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        (self.path / _HOLDER).unlink(missing_ok=True)
        self._lock.release()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file atomically (see `write_whole`) and return its path."""
        return write_whole(self.path / name, text)

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Write a binary file atomically (see `write_whole`) and return its path."""
        return write_whole(self.path / name, content)

    def write_json(self, name: str, value: Mapping[str, object] | Sequence[object]) -> Path:
        """Write a JSON file atomically and return its path. Non-finite numbers become null, as JSON has no NaN."""
        return self.write_text(name, json.dumps(finite(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def holding(path: Path) -> AbstractContextManager[object]:
    """Return the lock of the run folder that contains `path`; a context without a lock if that is no run folder."""
    run = path.absolute().parent
    return RunFolder(run) if (run / ENVIRONMENT).is_file() else nullcontext()


def refuse_held(path: Path) -> None:
    """Refuse a folder that another process is writing to; the folder itself does not change.

    Raises:
        ValueError: another process holds the folder; the message names it.
    """
    if (path / _LOCK).exists():
        _locked(path).release()


def refuse_unwritable(path: Path) -> None:
    """Refuse a folder, which need not exist yet, that cannot be made or written; nothing is left behind.

    Raises:
        ValueError: the path or a name in it is too long, a part of it is no folder, or nothing can be written there.
    """
    path = path.absolute()
    try:
        there = next(one for one in (path, *path.parents) if os.path.lexists(one))
        if not there.is_dir():
            raise Refusal(f"cannot use the folder {path}: {there} is not a folder")
        if (room := os.pathconf(there, "PC_PATH_MAX") - _INSIDE) < len(os.fsencode(path)):
            raise Refusal(f"the path of a folder must have at most {room} bytes, got {len(os.fsencode(path))}")
        if long := [part for part in path.parts if len(os.fsencode(part)) > os.pathconf(there, "PC_NAME_MAX")]:
            raise Refusal(f"the name of a folder is too long: {long[0]:.40}…")
        os.rmdir(tempfile.mkdtemp(dir=there, prefix=".chisel-"))
    except OSError as error:
        raise Refusal(f"cannot use the folder {path}: {error.strerror or error}; name another one") from None


def refuse_used(path: Path) -> None:
    """Refuse a folder that is in use, not empty or not writable; a folder that does not exist yet is accepted.

    Raises:
        ValueError: as `refuse_unwritable`; or another process holds the folder, or it contains files.
    """
    if os.path.lexists(path) and not os.path.isdir(path):
        raise Refusal(f"out must be a folder, got the file {path}")
    refuse_unwritable(path)
    if not path.exists():
        return
    refuse_held(path)
    if (path / CONFIG).exists():
        raise Refusal(
            f"the folder {path} holds a run or a model already; continue a run with --resume, or give another --out"
        )
    if others := contents(path):
        raise Refusal(f"out must be a new or empty folder, but {path} holds {others[0]!r}")


def contents(path: Path) -> list[str]:
    """Return the sorted names in a folder, without what a killed owner leaves behind: its lock and unfinished files."""
    names = sorted(entry.name for entry in path.iterdir())
    return [name for name in names if name not in (_LOCK, _HOLDER) and not is_temporary(name)]


def _locked(path: Path) -> FileLock:
    """Create a folder if it is missing and lock it; raises the errors of `RunFolder`."""
    lock = FileLock(path / _LOCK)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise Refusal(f"the folder {path} is in use by {_holder(path)}; wait for it, or give another --out") from None
    except OSError as error:
        raise Refusal(f"cannot use the folder {path}: {error.strerror or error}") from None
    return lock


def _holder(path: Path) -> str:
    try:
        holder = json.loads(bounded_text(path / _HOLDER, "the holder"))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
