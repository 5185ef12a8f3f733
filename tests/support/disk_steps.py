"""Runs steps one after the other on a disk of their own, and prints the exit code of each on a line.

    unshare --map-root-user --mount python tests/support/disk_steps.py DISK OPTIONS < steps.json

A step is a shell command, or a list of words for search.py, preceded by environment variables such as `HOME=/x`. A
command of search.py is a process of its own, but a fork of this one: PyTorch and transformers are imported once for all
steps instead of once for each, which takes seconds.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

_COULD_NOT_MOUNT = 99


def main(disk: str, options: str) -> None:
    steps: list[str | list[str]] = json.load(sys.stdin)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", disk], check=False).returncode:
        sys.exit(_COULD_NOT_MOUNT)
    for step in steps:
        if isinstance(step, str):
            code = subprocess.run(step, shell=True, check=False).returncode
        else:
            _import_once()
            child = os.fork()
            if child == 0:
                _end(_search(step))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, flush=True)


def _end(code: int) -> NoReturn:
    """Ends this fork. The usual way of ending touches, and so copies, all memory of the parent; that takes a second."""
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(code)


def _import_once() -> None:
    for module in ("finish", "run"):
        importlib.import_module(f"search.pipeline.{module}")
    importlib.import_module("transformers.models.llama.modeling_llama")


def _search(words: list[str]) -> int:
    from search.cli import main

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        os.environ[name] = value
    return main(words)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main(sys.argv[1], sys.argv[2])
