"""Two processes on a CPU heal to what one process heals to, within rounding."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from dataclasses import replace
from test_healing import PLAN, heal, subject
dense, model, text, judge = subject()
healed, _ = heal(model, dense, text, judge, replace(PLAN, tokens=480))
print(f"KL {{healed.looks[-1].kl:.8f}}", flush=True)
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def divergences(script: Path, count: int) -> list[float]:
    """What every process ends with; the environment is what `accelerate launch` and torchrun set."""
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(free_port())
    started = [
        subprocess.Popen(
            [sys.executable, str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]
    results = []
    for process in started:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]
        results += [float(line.split()[1]) for line in out.splitlines() if line.startswith("KL ")]
    return results


def test_two_processes_heal_like_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests")))
    [alone] = divergences(script, 1)
    assert divergences(script, 2) == pytest.approx([alone, alone], rel=1e-3)
