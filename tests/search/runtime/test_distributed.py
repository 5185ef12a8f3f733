"""Two processes on a CPU heal to what one process heals to, within rounding: sharing batches, or sharded as well."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_data import data_for_processes
from safetensors.torch import load_file
from search_process import forked
from small_run import words
from tiny_healing import PLAN, heal, heal_again, subject

from search import cli

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
TOKENS = (480, 960)
SHARDED = {"ACCELERATE_USE_FSDP": "true"}  # as `accelerate launch --use_fsdp` leaves it


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def healed_by(folders: Sequence[Path], places: Sequence[Path], **environment: str) -> list[int | None]:
    """Exit statuses of processes that heal together; the environment is what `accelerate launch` and torchrun set."""
    shared = {"WORLD_SIZE": str(len(folders)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(len(folders))]
    processes = [
        forked(heal_again, folder, TOKENS, place, said=place.with_suffix(".txt"), **environment, **shared, **own)
        for folder, place, own in zip(folders, places, ranks, strict=True)
    ]
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


def told(folder: Path, count: int, **environment: str) -> dict[str, list[float]]:
    """What every process measures."""
    places = [folder.with_suffix(f".{rank}.json") for rank in range(count)]
    assert healed_by([folder] * count, places, **environment) == [0] * count
    found = [json.loads(place.read_text()) for place in places]
    return {name: [value for one in found for value in one[name]] for name in ("KL", "SHARE")}


def test_two_processes_heal_like_one(tmp_path: Path) -> None:
    found, alone = {}, []
    for tokens in TOKENS:
        dense, model, text, judge = subject()
        heal(model, dense, text, judge, replace(PLAN, tokens=tokens), tmp_path / "one")
        alone.append(judge.measure(model).kl)
    for name, environment in (("two", {}), ("sharded", SHARDED)):
        found[name] = told(tmp_path / name, 2, **environment)
    first, second = alone
    assert second < first
    for name in ("two", "sharded"):
        assert found[name]["KL"] == pytest.approx([first, second] * 2, rel=1e-3)
    assert found["two"]["SHARE"] == []
    assert found["sharded"]["SHARE"] == pytest.approx([0.5] * 4, abs=0.02)


def test_a_process_that_cannot_read_the_checkpoints_of_the_first_says_so(tmp_path: Path) -> None:
    folders = [tmp_path / "disk 0", tmp_path / "disk 1"]
    assert 0 not in healed_by(folders, [tmp_path / "0.json", tmp_path / "1.json"])
    said = (tmp_path / "1.txt").read_text()
    assert "process 1 finds a checkpoint of step 0 in" in said
    assert "all processes must read the same disk" in said


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
