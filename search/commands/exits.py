"""Turns an exception into one line on standard error and an exit code. Knows no command and no model library."""

from __future__ import annotations

import errno
import os
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from compression.refusal import Refusal
from compression.storage.whole_files import regular
from search.config import Config
from search.runtime.errors import DataUnavailable, EvaluatorsLost
from search.runtime.outside_text import plain
from search.runtime.provenance import now
from search.runtime.run_folder import LOG
from search.runtime.signals import INTERRUPTED
from search.runtime.streams import lost

__all__ = [
    "DONE",
    "FAILURES",
    "FAULT",
    "PREFLIGHT",
    "REFUSED",
    "complain",
    "explain",
    "refuse",
    "resumed",
    "say",
    "system_error",
]

DONE, FAULT, REFUSED, PREFLIGHT, FAILURES = 0, 1, 2, 3, 4
"""Exit codes: done; a fault of this project; refused before any work, because of the input or because data or a device
is missing; `doctor` found what keeps the job from running; stopped or finished with failures. 130 means interrupted."""


_MACHINE = frozenset(
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "EMFILE", "ENFILE", "ENOMEM", "ENOLCK", "ESTALE", "EBUSY")
    if hasattr(errno, name)
)
"""What the machine lacks, whichever file it is: solved outside, and the same command then continues. Any other system
error is about its path."""


def resumed(folder: Path | None, *command: str) -> list[str]:
    """The words of the command line that continues a run in its folder; empty while there is no folder yet."""
    return [*command, "--resume", str(folder)] if folder else []


def explain(error: BaseException, again: Sequence[str] = (), folder: Path | None = None) -> int:
    """One line on standard error and an exit code for an exception that ended a command.

    A system error that names a path is the user's to solve: with code 4 where something of the machine is used up or a
    run folder is open already, else with code 2. An exception that is no refusal and no system error is a fault of this
    project: the line says so, and the traceback goes to run.log in the run folder, or to standard error while there is
    no folder. With CHISEL_TRACEBACK set in the environment every exception is raised instead.

    Args:
        again: the words of the command that continues what was stopped, if there is one.
        folder: the run folder, if there is one already.
    """
    if os.environ.get("CHISEL_TRACEBACK") and not isinstance(error, KeyboardInterrupt):
        raise error
    command = shlex.join(["python", "search.py", *again])
    resume = f"; after solving that, continue with: {command}" if again else ""
    if isinstance(error, KeyboardInterrupt):
        message = f"interrupted; continue with: {command}" if again else "interrupted"
        complain(message)
        if lost(sys.stderr):  # the terminal is gone
            _log(f"{message}\n", folder)
        return INTERRUPTED
    if isinstance(error, Refusal | DataUnavailable):
        return refuse(str(error))
    if isinstance(error, EvaluatorsLost):
        return _stopped(f"{error}{resume}")
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return _stopped(f"out of memory; use --quick or fewer --calibration-tokens{resume}")
    if isinstance(error, SystemExit | BrokenPipeError):
        raise error
    if (failed := system_error(error)) is not None:
        reason = f"{failed.strerror}: {failed.filename}" if failed.filename else str(failed.strerror)
        if failed.errno not in _MACHINE and folder is None:
            return refuse(f"cannot use {failed.filename}: {failed.strerror}{resume}")
        return _stopped(f"{reason}{resume}")
    complain(
        f"this is a fault of Chisel, not of your input: {type(error).__name__}: {error}; please report it with the "
        f"traceback in {_logged(error, folder)} and the output of: python search.py doctor --json"
    )
    return FAULT


def system_error(error: BaseException) -> OSError | None:
    """The system error that an exception is, was raised from, or names in its text as libraries written in Rust do.

    Returns None for an error that names neither a path nor a lack of the machine: that one is a fault of this project.
    """
    seen: BaseException | None = error
    while seen is not None:
        told = re.search(r"\(os error (\d+)\)", str(seen))
        if told is not None and not isinstance(seen, OSError):
            seen = OSError(int(told[1]), os.strerror(int(told[1])))
        if isinstance(seen, OSError) and (seen.errno in _MACHINE or (seen.errno and isinstance(seen.filename, str))):
            return seen
        seen = seen.__cause__
    return None


def _stopped(reason: str) -> int:
    complain(f"stopped: {reason}")
    return FAILURES


def _logged(error: BaseException, folder: Path | None) -> str:
    """Write the traceback to run.log in `folder`, or to standard error if that is not possible; returns the place."""
    text = plain("".join(traceback.format_exception(error)), lines=True)
    if _log(text, folder):
        return f"{folder}/{LOG}"
    print(text, end="", file=sys.stderr)
    return "the lines above"


def _log(text: str, folder: Path | None) -> bool:
    """Append a text to run.log in `folder`; returns whether that was possible."""
    if folder is not None:
        with (
            suppress(OSError),
            open(folder / LOG, "a", encoding="utf-8", errors="backslashreplace", opener=regular) as log,
        ):
            log.write(f"{now()} {text}")
            return True
    return False


def refuse(message: str) -> int:
    """Print the refusal as one line; returns its exit code."""
    complain(message)
    return REFUSED


def complain(message: str) -> None:
    """Print one line on standard error, or on standard output if the former is closed or cannot be written.

    If a message starts with the name of a field, its flag is shown instead.
    """
    first, _, rest = message.partition(" ")
    if first in Config.model_fields and rest.startswith("must be"):
        message = f"--{first.replace('_', '-')} {rest}"
    line = f"search.py: {plain(' '.join(message.split()))}"
    print(line, file=sys.stderr)
    if lost(sys.stderr):
        print(line)


def say(*lines: object, end: str = "\n") -> None:
    """Print the result of a command on standard output; control characters in it are shown, not obeyed."""
    print(*(plain(line, lines=True) for line in lines), sep="\n", end=end, flush=True)
