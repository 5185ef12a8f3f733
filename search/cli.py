"""The command line: picks the command, silences libraries, and returns its exit code.

Imports no model library. Each command imports what it needs when it runs, so that `--help` and refusals are quick.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from compression.refusal import nearest
from search.commands import COMMANDS
from search.commands.exits import DONE, FAILURES, REFUSED, explain, refuse
from search.runtime.signals import guarded

__all__ = ["DONE", "FAILURES", "REFUSED", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. `argv` is without the program's name."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words.pop(0) if words and not words[0].startswith("-") else COMMANDS[0]
    if command not in COMMANDS:
        return refuse(f"unknown command {command!r}; the nearest is {nearest(command, COMMANDS)}, and --help lists all")
    try:
        with guarded(), warnings.catch_warnings():
            _quiet_libraries()
            code: int = import_module(f"search.commands.{command}").run(words)
            return code
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else REFUSED
    except BrokenPipeError:
        # The reader of our output is gone; without this, Python would report it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURES
    except Exception as error:  # raised before or after the command's own work, as by reading its arguments
        return explain(error)


def _quiet_libraries() -> None:
    """Silence libraries before they are imported. PYTHONWARNINGS shows their warnings again."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
