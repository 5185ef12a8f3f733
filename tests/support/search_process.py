"""Processes that start at once: forked from a server that has imported torch and transformers.

For tests that start many processes; a fresh interpreter spends seconds on imports.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from search.data import packages

__all__ = ["forked", "started"]

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["search.pipeline.finish", "search.pipeline.run", "transformers.models.llama.modeling_llama"]
)


def forked(
    work: Callable[..., None], *arguments: object, said: Path | None = None, **environment: str
) -> ForkServerProcess:
    """Starts a function of a module in a process with the environment of this one, changed as given, and one thread.

    Its stderr goes into `said`; without one, to where it went when the first such process was started.
    """
    process = _SERVER.Process(target=_run, args=(work, arguments, {**os.environ, **environment}, said))
    process.start()
    return process


def started(*words: str, said: Path | None = None) -> ForkServerProcess:
    """Starts search.py with these words in a session of its own; stdout is dropped, and stderr goes into `said`."""
    return forked(_search, words, packages.REQUIREMENTS, said=said)


def _run(
    work: Callable[..., None], arguments: tuple[object, ...], environment: Mapping[str, str], said: Path | None
) -> None:
    import torch

    if said is not None:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    work(*arguments)


def _search(words: tuple[str, ...], requirements: Path) -> None:
    from search.cli import main

    os.setsid()
    packages.REQUIREMENTS = requirements
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(main(list(words)))
