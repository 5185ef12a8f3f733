"""Commands on a disk of their own: a file system in memory, in a mount namespace that ends with them."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

from benchmarks.chaos import ROOT
from search.data import packages

__all__ = ["SEARCH", "on_a_disk"]

SEARCH = [
    *("--model", "random:tiny-llama", "--device", "cpu", "--dtype", "float32", "--threads", "1", "--quiet"),
    *("--agent", "random", "--target-kept", "0.7", "--calibration-tokens", "1500", "--repair-tokens", "0"),
    *("--search-items", "2", "--search-text-tokens", "128", "--heldout-tokens", "600", "--report-items", "6"),
    *("--heal-minutes", "0", "--benchmark-items", "0", "--export", "none"),
]
"""Words for search.py: a run that takes two seconds."""
_APART = ("unshare", "--map-root-user", "--mount")


def on_a_disk(disk: Path, options: str, *steps: str | list[str], fresh: bool = False) -> tuple[list[int], str]:
    """Runs steps one after the other, with a disk in `disk`; returns their exit codes and what they said on stderr.

    Args:
        options: of the disk's mount, as "size=400k" or "ro".
        steps: shell commands, words for search.py, or Python code, see `disk_steps`.
        fresh: whether the process of the steps starts, and imports all it needs, in the present environment. Otherwise
            the process of earlier calls serves this one too.
    """
    disk.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        said = Path(scratch) / "said"
        request = {
            "disk": str(disk),
            "options": options,
            "steps": steps,
            "environment": {**os.environ, "OMP_NUM_THREADS": "1"},
            "requirements": str(packages.REQUIREMENTS),
            "said": str(said),
        }
        server = _started() if fresh else _server()
        try:
            assert server.stdin is not None
            assert server.stdout is not None
            print(json.dumps(request), file=server.stdin, flush=True)
            answer = server.stdout.readline()
        finally:
            if fresh:
                _ended(server)
        return json.loads(answer), said.read_text(encoding="utf-8")


def _started() -> subprocess.Popen[str]:
    if subprocess.run([*_APART, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    return subprocess.Popen(
        [*_APART, sys.executable, str(Path(__file__).with_name("disk_steps.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )


@cache
def _server() -> subprocess.Popen[str]:
    server = _started()
    atexit.register(_ended, server)
    return server


def _ended(server: subprocess.Popen[str]) -> None:
    server.communicate(timeout=60)
