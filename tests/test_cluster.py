"""docs/cluster.md on a real cluster: `ray start` for two nodes on this machine, a job submitted, and resumed."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from disks import SEARCH
from fakedata import data_for_processes

from benchmarks.chaos import ROOT, journal

RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def end(process: psutil.Popen) -> None:
    family = [process, *process.children(recursive=True)]
    for each in family:
        each.kill()
    psutil.wait_procs(family, timeout=30)
    process.stdout.close()


def start_node(stack: ExitStack, *flags: str) -> None:
    """Ray gives up when a node is not up in half a minute; a busy machine needs another try."""
    for _ in range(4):
        words = [*RAY, "start", "--node-ip-address=127.0.0.1", "--num-cpus=2", "--block", *flags]
        process = psutil.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ))
        if any("Ray runtime started" in line for line in process.stdout):
            stack.callback(end, process)
            return
        end(process)
    raise AssertionError("no node of Ray can be started")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cluster of two nodes with a token, and the address that jobs are submitted to in the environment."""
    data_for_processes(tmp_path, monkeypatch)
    port, web = free_ports(2)
    for name, value in {
        "HOME": str(tmp_path),
        # A node is started from the environment of the project, as docs/cluster.md says: the job's `python` is its own.
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{web}",
    }.items():
        monkeypatch.setenv(name, value)
    # Sockets lie in Ray's folder, and their names must be short.
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder, ExitStack() as stack:
        web_flags = ["--dashboard-host=127.0.0.1", f"--dashboard-port={web}", "--include-dashboard=true"]
        start_node(stack, "--head", f"--port={port}", f"--temp-dir={folder}", *web_flags)
        start_node(stack, f"--address=127.0.0.1:{port}")
        yield


def submit(*words: str) -> str:
    done = subprocess.run(
        [*RAY, "job", "submit", "--working-dir", ".", "--", "python", "search.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.usefixtures("cluster")
def test_a_job_runs_on_two_nodes_and_is_resumed_into_its_folder(tmp_path: Path) -> None:
    run, words = tmp_path / "run", SEARCH[2:]
    said = submit(*words, "--budget", "4", "--ray-address", "auto", "--evaluators", "3", "--out", str(run))
    assert str(run) in said
    first = journal(run / "study.db")
    assert len(first) == 4
    submit("--resume", str(run), "--budget", "6", "--ray-address", "auto", "--quiet")
    both = journal(run / "study.db")
    assert len(both) == 6
    assert all(both[number] == trial for number, trial in first.items())
    assert json.loads((run / "config.json").read_text())["ray_address"] == "auto"
