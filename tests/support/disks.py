"""Commands on a disk of their own: a file system in memory, in a mount namespace that ends with them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.chaos import ROOT

__all__ = ["SEARCH", "on_a_disk"]

SEARCH = [
    *(sys.executable, "search.py", "--model", "random:tiny-llama", "--device", "cpu", "--threads", "1", "--quiet"),
    *("--agent", "random", "--target-kept", "0.7", "--calibration-tokens", "1500", "--repair-tokens", "0"),
    *("--search-items", "2", "--search-text-tokens", "128", "--heldout-tokens", "600", "--report-items", "6"),
    *("--heal-minutes", "0", "--benchmark-items", "0", "--export", "none"),
]
_APART = ("unshare", "--map-root-user", "--mount")


def on_a_disk(disk: Path, options: str, *steps: str) -> tuple[list[int], str]:
    """Exit codes of shell commands, one after the other, with a disk in `disk`; and what they complained of.

    Args:
        options: for its mount, as "size=400k" or "ro".
    """
    if subprocess.run([*_APART, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    disk.mkdir(parents=True, exist_ok=True)
    mount = f"mount -t tmpfs -o {options} none {shlex.quote(str(disk))}"
    script = "\n".join([f"{mount} || exit 99", *(f"{step}; echo $?" for step in steps)])
    done = subprocess.run(
        [*_APART, "sh", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    return [int(line) for line in done.stdout.split("\n") if line.isdecimal()], done.stderr
