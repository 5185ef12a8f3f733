"""Two processes on a CPU heal to what one process heals to, within rounding: from Python, and by the command."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakedata import data_for_processes
from safetensors.torch import load_file
from test_pipeline import words

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


def test_the_command_started_by_accelerate_heals_like_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_for_processes(tmp_path, monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = tmp_path / "a run"
    search = [sys.executable, "search.py", *words(out=run, budget=0, agent="lagrangian", heal_minutes=0)]
    subprocess.run(search, cwd=ROOT, check=True, capture_output=True, timeout=300)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines=1", "--dynamo_backend=no"]
    launch += ["--mixed_precision=no", "--num_processes=2", f"--main_process_port={free_port()}"]
    heal = ["search.py", "heal", str(run), "--tokens=300", "--row-tokens=32", "--batch-tokens=64", "--quiet", "--out"]
    found = {}
    for name, start in (("one", [sys.executable]), ("two", launch)):
        done = subprocess.run(
            [*start, *heal, str(tmp_path / name)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("export it with") == 1
        found[name] = load_file(tmp_path / name / "weights.safetensors")
        assert not [path.name for path in (tmp_path / name).iterdir() if path.name.startswith("unfinished")]
    assert found["one"].keys() == found["two"].keys()
    for name, tensor in found["one"].items():
        torch.testing.assert_close(found["two"][name], tensor, rtol=1e-3, atol=1e-4)
