"""The command line: picks the command, prepares libraries, and returns its exit code.

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
from search.commands.exits import DONE, FAILURES, REFUSED, complain, explain, refuse
from search.runtime.signals import guarded
from search.runtime.streams import lost, sturdy_streams

__all__ = ["DONE", "FAILURES", "REFUSED", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. `argv` is without the program's name."""
    with sturdy_streams():
        code = _run(list(sys.argv[1:] if argv is None else argv))
        if sys.stdout is not sys.stderr and (error := lost(sys.stdout)):
            complain(f"standard output could not be written ({error.strerror or error}); what it holds is not complete")
            return code or FAILURES
        return code


def _run(words: list[str]) -> int:
    command = words.pop(0) if words and not words[0].startswith("-") else COMMANDS[0]
    if command not in COMMANDS:
        return refuse(f"unknown command {command!r}; the nearest is {nearest(command, COMMANDS)}, and --help lists all")
    try:
        with guarded(), warnings.catch_warnings():
            _prepare_libraries()
            code: int = import_module(f"search.commands.{command}").run(words)
            return code
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else REFUSED
    except Exception as error:  # raised before or after the command's own work, as by reading its arguments
        return explain(error)


def _prepare_libraries() -> None:
    """Set what libraries read when they are imported. PYTHONWARNINGS shows their warnings again.

    Threads of GNU OpenMP spin while they wait for each other, for milliseconds. Beside another job on the same
    processors a pass then takes many times as long, so they spin for a shorter time and then sleep.
    """
    for name, value in {
        "GOMP_SPINCOUNT": "10000",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
