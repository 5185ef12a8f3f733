"""A search that cannot be killed: SIGKILL to the driver and to evaluators, and the whole job resumed after it."""

from __future__ import annotations

import os
import random
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil
import pytest
from fake_data import data_for_processes
from search_process import started

from benchmarks.chaos import SMALL, journal
from search import cli

pytestmark = pytest.mark.slow
TINY = [*SMALL.split()[:-2], "--model", "random:tiny-llama", "--repair-tokens", "0", "--quiet"]
KILLS = 3


def test_a_driver_killed_again_and_again_loses_nothing_and_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_for_processes(tmp_path, monkeypatch)
    undisturbed, cut = tmp_path / "whole", tmp_path / "cut"
    words = [*TINY, "--budget", "60"]  # so many that all kills come before the end on a fast machine too
    assert ended(started(*words, "--out", str(undisturbed))) == cli.DONE
    process, kills, chance = started(*words, "--out", str(cut)), 0, random.Random(5)
    seen: dict[int, list[tuple[object, ...]]] = {}
    more = chance.randint(0, 2)
    while process.is_alive() and kills < KILLS:
        if (cut / "config.json").exists() and len(journal(cut / "study.db")) >= len(seen) + more:
            time.sleep(chance.uniform(0, 0.1))
            process.kill()
            process.join()
            kills, more = kills + 1, chance.randint(0, 2)
            found = journal(cut / "study.db")
            assert all(found[number] == trial for number, trial in seen.items())
            seen = found
            process = started("--resume", str(cut), "--quiet")
        time.sleep(0.01)
    assert ended(process) == cli.DONE
    assert kills == KILLS
    found = journal(undisturbed / "study.db")
    assert len({reward for [(_, _, reward)] in found.values()}) > 12
    assert journal(cut / "study.db") == found


def ended(process: ForkServerProcess) -> int | None:
    """The exit code of a process when it has ended; None after ten minutes."""
    process.join(600)
    return process.exitcode


@pytest.mark.parametrize(("evaluators", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_polite_end_tells_how_to_go_on_and_leaves_no_process(
    evaluators: int, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_for_processes(tmp_path, monkeypatch)
    run, said = tmp_path / "mit leerzeichen", tmp_path / "said"
    words = [*TINY, "--budget", "5000", "--evaluators", str(evaluators), "--out", str(run)]
    process = started(*words, said=said)
    while len(journal(run / "study.db")) < 2 and process.is_alive():
        time.sleep(0.1)
    assert process.pid is not None
    family = psutil.Process(process.pid).children(recursive=True)
    assert bool(family) == (evaluators > 1)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does on Ctrl-C
    else:
        os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == 130
    ending = f"search.py: interrupted; continue with: python search.py --resume '{run}'\n"
    assert said.read_text().endswith(ending), said.read_text()
    assert not psutil.wait_procs(family, timeout=30)[1]
    before = journal(run / "study.db")
    more = ["--budget", str(len(before) + 2), "--evaluators", "1", "--quiet"]
    assert cli.main(["--resume", str(run), *more]) == cli.DONE
    after = journal(run / "study.db")
    assert len(after) == len(before) + 2
    assert all(after[trial] == was for trial, was in before.items())
