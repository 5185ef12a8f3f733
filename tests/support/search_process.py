"""search.py in a process of its own that starts at once: forked from a server that has imported torch and transformers.

For tests that start and kill many such processes; a fresh interpreter spends seconds on imports.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from search.data import packages

__all__ = ["started"]

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["search.pipeline.finish", "search.pipeline.run", "transformers.models.llama.modeling_llama"]
)


def started(*words: str) -> ForkServerProcess:
    """Starts search.py with these words, the environment of this process and one thread; its output is dropped."""
    process = _SERVER.Process(target=_run, args=(words, dict(os.environ), packages.REQUIREMENTS))
    process.start()
    return process


def _run(words: tuple[str, ...], environment: Mapping[str, str], requirements: Path) -> None:
    import torch

    from search.cli import main

    os.environ.clear()
    os.environ.update(environment)
    packages.REQUIREMENTS = requirements
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(main(list(words)))
