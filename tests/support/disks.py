"""Commands on a disk of their own: a file system in memory, in a mount namespace that ends with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.chaos import ROOT

__all__ = ["SEARCH", "on_a_disk"]

SEARCH = [
    *("--model", "random:tiny-llama", "--device", "cpu", "--dtype", "float32", "--threads", "1", "--quiet"),
    *("--agent", "random", "--target-kept", "0.7", "--calibration-tokens", "1500", "--repair-tokens", "0"),
    *("--search-items", "2", "--search-text-tokens", "128", "--heldout-tokens", "600", "--report-items", "6"),
    *("--heal-minutes", "0", "--benchmark-items", "0", "--export", "none"),
]
"""Words for search.py: a run that takes two seconds."""
_APART = ("unshare", "--map-root-user", "--mount")


def on_a_disk(disk: Path, options: str, *steps: str | list[str]) -> tuple[list[int], str]:
    """Runs steps one after the other, with a disk in `disk`; returns their exit codes and what they said on stderr.

    Args:
        options: of the disk's mount, as "size=400k" or "ro".
        steps: shell commands, or words for search.py, see `disk_steps`.
    """
    if subprocess.run([*_APART, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    disk.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [*_APART, sys.executable, str(Path(__file__).with_name("disk_steps.py")), str(disk), options],
        input=json.dumps(steps),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    return [int(line) for line in done.stdout.split("\n") if line.isdecimal()], done.stderr
