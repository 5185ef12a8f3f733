"""Failures: one line on standard error and an exit code. Knows no command and no model library."""

from __future__ import annotations

import errno
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from search.config import Config
from search.runtime.errors import EvaluatorsLost
from search.runtime.signals import INTERRUPTED

__all__ = ["DONE", "FAILURES", "PREFLIGHT", "REFUSED", "complain", "explain", "refuse", "resumed"]

DONE, REFUSED, PREFLIGHT, FAILURES = 0, 2, 3, 4
"""Exit codes: done; refused before any work (input, or data or device not there); `doctor` found what keeps the job
from running; stopped or finished with failures; 130 is interrupted."""


def resumed(folder: Path | None, *command: str) -> list[str]:
    """Words that make a command go on in its folder; none while it has no folder yet."""
    return [*command, "--resume", str(folder)] if folder else []


def explain(error: BaseException, again: Sequence[str] = ()) -> int:
    """One line and an exit code for a failure that a person can act on; any other is a fault of ours and is raised.

    Args:
        again: the words of the command that goes on with what was stopped, if there is one.
    """
    command = shlex.join(["python", "search.py", *again])
    if isinstance(error, KeyboardInterrupt):
        complain(f"interrupted; continue with: {command}" if again else "interrupted")
        return INTERRUPTED
    from search.runtime.errors import DataUnavailable

    if isinstance(error, DataUnavailable):
        complain(str(error))
        return REFUSED
    if isinstance(error, ValueError) and not os.environ.get("CHISEL_TRACEBACK"):
        return refuse(str(error))
    resume = f"; once that is mended: {command}" if again else ""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
        complain(f"stopped: {error.strerror}{resume}")
        return FAILURES
    if isinstance(error, EvaluatorsLost):
        complain(f"stopped: {error}{resume}")
        return FAILURES
    if isinstance(error, MemoryError):
        complain(f"stopped: out of memory; use --quick or fewer --calibration-tokens{resume}")
        return FAILURES
    raise error


def refuse(message: str) -> int:
    """One line; returns the exit code of a refusal."""
    complain(message)
    return REFUSED


def complain(message: str) -> None:
    """One line on standard error. A message that starts with a field's name is shown with its flag."""
    first, _, rest = message.partition(" ")
    if first in Config.model_fields and rest.startswith("must be"):
        message = f"--{first.replace('_', '-')} {rest}"
    print(f"search.py: {' '.join(message.split())}", file=sys.stderr)
