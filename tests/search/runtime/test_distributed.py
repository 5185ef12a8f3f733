"""Two processes on a CPU heal to what one process heals to, within rounding: sharing batches, or sharded as well."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_data import data_for_processes
from safetensors.torch import load_file
from small_run import words
from tiny_healing import PLAN, heal, subject

from search import cli

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
TOKENS = (480, 960)
SHARDED = {"ACCELERATE_USE_FSDP": "true"}  # as `accelerate launch --use_fsdp` leaves it
SCRIPT = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from dataclasses import replace
from pathlib import Path
from tiny_healing import PLAN, heal, subject
from torch.distributed.tensor import DTensor
from search.healing.sharding import Sharding
ended = Sharding.end
def end(self):
    held = [p for each in (model, dense) for p in each.parameters() if isinstance(p, DTensor)]
    print(f"SHARE {{sum(p.to_local().numel() for p in held) / sum(p.numel() for p in held):.3f}}", flush=True)
    ended(self)
Sharding.end = end
for tokens in {tokens}:
    dense, model, text, judge = subject()
    heal(model, dense, text, judge, replace(PLAN, tokens=tokens), Path({folder!r}))
    print(f"KL {{judge.measure(model).kl:.8f}}", flush=True)
"""
"""Heals, and once more for as long again, from where it stood; tells what share of the blocks a process holds."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def told(script: Path, count: int, **environment: str) -> dict[str, list[float]]:
    """What every process prints; the environment is what `accelerate launch` and torchrun set."""
    shared = {**os.environ, **environment, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
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
    results: dict[str, list[float]] = {"KL": [], "SHARE": []}
    for process in started:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]
        for name, value in (line.split() for line in out.splitlines()):
            results[name].append(float(value))
    return results


def test_two_processes_heal_like_one(tmp_path: Path) -> None:
    found, alone = {}, []
    for tokens in TOKENS:
        dense, model, text, judge = subject()
        heal(model, dense, text, judge, replace(PLAN, tokens=tokens), tmp_path / "one")
        alone.append(judge.measure(model).kl)
    for name, environment in (("two", {}), ("sharded", SHARDED)):
        script = tmp_path / f"{name}.py"
        script.write_text(
            SCRIPT.format(
                root=str(ROOT), tests=str(ROOT / "tests" / "support"), folder=str(tmp_path / name), tokens=TOKENS
            )
        )
        found[name] = told(script, 2, **environment)
    first, second = alone
    assert second < first
    for name in ("two", "sharded"):
        assert found[name]["KL"] == pytest.approx([first, second] * 2, rel=1e-3)
    assert found["two"]["SHARE"] == []
    assert found["sharded"]["SHARE"] == pytest.approx([0.5] * 4, abs=0.02)


def test_the_command_started_by_accelerate_heals_like_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_for_processes(tmp_path, monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = tmp_path / "a run"
    assert cli.main(words(out=run, budget=0, agent="lagrangian", dtype="float32")) == cli.DONE
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines=1", "--dynamo_backend=no"]
    launch += ["--mixed_precision=no", "--num_processes=2", f"--main_process_port={free_port()}"]
    command = ["heal", str(run), "--tokens=300", "--row-tokens=32", "--batch-tokens=64", "--quiet", "--out"]
    assert cli.main([*command, str(tmp_path / "one")]) == cli.DONE
    one = load_file(tmp_path / "one" / "weights.safetensors")
    done = subprocess.run(
        [*launch, "search.py", *command, str(tmp_path / "sharded")],
        cwd=ROOT,
        env={**os.environ, **SHARDED},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("export it with") == 1
    assert not [path.name for path in (tmp_path / "sharded").iterdir() if path.name.startswith("unfinished")]
    sharded = load_file(tmp_path / "sharded" / "weights.safetensors")
    assert one.keys() == sharded.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(sharded[name], tensor, rtol=1e-3, atol=1e-4)
