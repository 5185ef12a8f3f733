"""Runs steps on disks of their own: one request after the other, each with a file system in memory.

    unshare --map-root-user --mount python tests/support/disk_steps.py

Every line of stdin is a request as JSON: "disk", the folder of the disk; "options" of its mount; "steps"; "environment"
of all steps; "requirements", the file that pins the data packages; and "said", a file that receives stderr. The answer
is a line with the exit codes of the steps as JSON.

A step is a shell command; a list of words for search.py, preceded by environment variables such as `HOME=/x`; or
`["-c", code, arguments...]` for Python code. Commands of search.py and Python code are processes of their own, but
forks of this one: PyTorch and transformers are imported once for all requests instead of once for each, which takes
seconds.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

_COULD_NOT_MOUNT = 99


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), file=answers, flush=True)


def _answer(request: dict[str, Any]) -> list[int]:
    said = os.open(request["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, sys.stderr.fileno())
    os.close(said)
    os.environ.clear()
    os.environ.update(request["environment"])
    disk = request["disk"]
    if subprocess.run(["mount", "-t", "tmpfs", "-o", request["options"], "none", disk], check=False).returncode:
        return [_COULD_NOT_MOUNT]
    try:
        return [_code(step, request["requirements"]) for step in request["steps"]]
    finally:
        subprocess.run(["umount", "--lazy", disk], check=False)


def _code(step: str | list[str], requirements: str) -> int:
    """The exit code of a step."""
    if isinstance(step, str):
        return subprocess.run(step, shell=True, check=False).returncode
    _import_once()
    child = os.fork()
    if child == 0:
        _end(_run(step, requirements))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _end(code: int) -> NoReturn:
    """Ends this fork. The usual way of ending touches, and so copies, all memory of the parent; that takes a second."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _import_once() -> None:
    for module in ("finish", "run"):
        importlib.import_module(f"search.pipeline.{module}")
    importlib.import_module("transformers.models.llama.modeling_llama")


def _run(words: list[str], requirements: str) -> int:
    from search.cli import main
    from search.data import packages

    packages.REQUIREMENTS = Path(requirements)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
        return 0
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        os.environ[name] = value
    return main(words)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
