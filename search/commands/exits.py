"""Turns an exception into one line on standard error and an exit code. Knows no command and no model library."""

from __future__ import annotations

import errno
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from compression.refusal import Refusal
from search.config import Config
from search.runtime.errors import DataUnavailable, EvaluatorsLost
from search.runtime.outside_text import plain
from search.runtime.provenance import now
from search.runtime.run_folder import LOG
from search.runtime.signals import INTERRUPTED

__all__ = ["DONE", "FAILURES", "FAULT", "PREFLIGHT", "REFUSED", "complain", "explain", "refuse", "resumed", "say"]

DONE, FAULT, REFUSED, PREFLIGHT, FAILURES = 0, 1, 2, 3, 4
"""Exit codes: done; a fault of this project; refused before any work, because of the input or because data or a device
is missing; `doctor` found what keeps the job from running; stopped or finished with failures. 130 means interrupted."""


def resumed(folder: Path | None, *command: str) -> list[str]:
    """The words of the command line that continues a run in its folder; empty while there is no folder yet."""
    return [*command, "--resume", str(folder)] if folder else []


def explain(error: BaseException, again: Sequence[str] = (), folder: Path | None = None) -> int:
    """One line on standard error and an exit code for an exception that ended a command.

    An exception that is no refusal and no failure of the machine is a fault of this project: the line says so, and the
    traceback goes to run.log in the run folder, or to standard error while there is no folder. With CHISEL_TRACEBACK
    set in the environment every exception is raised instead.

    Args:
        again: the words of the command that continues what was stopped, if there is one.
        folder: the run folder, if there is one already.
    """
    if os.environ.get("CHISEL_TRACEBACK") and not isinstance(error, KeyboardInterrupt):
        raise error
    command = shlex.join(["python", "search.py", *again])
    resume = f"; after solving that, continue with: {command}" if again else ""
    if isinstance(error, KeyboardInterrupt):
        complain(f"interrupted; continue with: {command}" if again else "interrupted")
        return INTERRUPTED
    if isinstance(error, Refusal | DataUnavailable):
        return refuse(str(error))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
        return _stopped(f"{error.strerror}{resume}")
    if isinstance(error, EvaluatorsLost):
        return _stopped(f"{error}{resume}")
    if isinstance(error, MemoryError):
        return _stopped(f"out of memory; use --quick or fewer --calibration-tokens{resume}")
    if isinstance(error, SystemExit):
        raise error
    complain(
        f"this is a fault of Chisel, not of your input: {type(error).__name__}: {error}; please report it with the "
        f"traceback in {_logged(error, folder)} and the output of: python search.py doctor --json"
    )
    return FAULT


def _stopped(reason: str) -> int:
    complain(f"stopped: {reason}")
    return FAILURES


def _logged(error: BaseException, folder: Path | None) -> str:
    """Write the traceback to run.log in `folder`, or to standard error if that is not possible; returns the place."""
    text = plain("".join(traceback.format_exception(error)), lines=True)
    if folder is not None:
        with suppress(OSError), (folder / LOG).open("a", encoding="utf-8") as log:
            log.write(f"{now()} {text}")
            return str(folder / LOG)
    print(text, end="", file=sys.stderr)
    return "the lines above"


def refuse(message: str) -> int:
    """Print the refusal as one line; returns its exit code."""
    complain(message)
    return REFUSED


def complain(message: str) -> None:
    """Print one line on standard error. If a message starts with the name of a field, its flag is shown instead."""
    first, _, rest = message.partition(" ")
    if first in Config.model_fields and rest.startswith("must be"):
        message = f"--{first.replace('_', '-')} {rest}"
    print(f"search.py: {plain(' '.join(message.split()))}", file=sys.stderr)


def say(*lines: object, end: str = "\n") -> None:
    """Print the result of a command on standard output; control characters in it are shown, not obeyed."""
    print(*(plain(line, lines=True) for line in lines), sep="\n", end=end, flush=True)
