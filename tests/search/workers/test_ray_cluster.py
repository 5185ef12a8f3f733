"""docs/cluster.md on a real cluster: `ray start` for two nodes on this machine, a job submitted, and resumed."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from disks import SEARCH
from fake_data import data_for_processes

from benchmarks.chaos import ROOT, journal, rage
from benchmarks.local_cluster import RAY, LocalCluster

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A cluster of two nodes with room for one evaluator each, and data in the environment."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        data_for_processes(home, patch)
        with LocalCluster(home=home) as started:
            started.add(processors=1)
            started.add(processors=1)
            yield started


def submit(cluster: LocalCluster, *words: str) -> str:
    for _ in range(20):  # on a busy machine the nodes are up before Ray's agent for jobs is
        done = subprocess.run(
            [*RAY, "job", "submit", "--working-dir", ".", "--", "python", "search.py", *words],
            cwd=ROOT,
            env=cluster.environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        if "No available agent to submit job" not in done.stderr:
            break
        time.sleep(3)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_job_runs_on_two_nodes_and_is_resumed_into_its_folder(cluster: LocalCluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = submit(cluster, *SEARCH, "--budget", "3", "--ray-address", "auto", "--evaluators", "2", "--out", str(run))
    assert str(run) in said
    first = journal(run / "study.db")
    assert len(first) == 3
    submit(cluster, "--resume", str(run), "--budget", "4", "--ray-address", "auto", "--evaluators", "1", "--quiet")
    both = journal(run / "study.db")
    assert len(both) == 4
    assert all(both[number] == trial for number, trial in first.items())
    assert json.loads((run / "config.json").read_text())["ray_address"] == "auto"


def test_evaluators_nodes_and_drivers_that_are_killed_lose_and_repeat_no_trial(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    for node in cluster.nodes[1:]:  # evaluators run on the node that is killed, and nowhere else
        cluster.kill(node)
    tally = rage(tmp_path / "läuft weiter", ["evaluator", "node", "driver"], "random:tiny-llama", 1, 0, cluster)
    assert tally.kills == {"evaluator": 1, "node": 1, "driver": 1}
    assert len(tally.acknowledged) >= 3
    assert (tally.lost, tally.duplicated, tally.orphans) == (0, 0, 0)


def test_a_node_that_has_ended_by_itself_can_be_killed(cluster: LocalCluster) -> None:
    node = psutil.Popen(["true"], stdout=subprocess.PIPE)
    node.wait()
    cluster.nodes.append(node)
    cluster.kill(node)
    assert node not in cluster.nodes
    assert node.stdout.closed
