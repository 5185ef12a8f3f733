"""Kills driver, evaluators and nodes at random and counts lost and duplicated trials and left-over processes.

    python -m benchmarks.chaos [--quick] [--write] [--kills N] [--evaluators N] [--model NAME] [--seed N]

A search runs as a user would run it, in its own process with evaluators in theirs. For half of the kills it starts its
own Ray, for the other half it uses a cluster that has all evaluators on one node. After a random time the driver, one
evaluator or the node with all evaluators gets SIGKILL. A killed driver is started again with --resume, and a killed
node is replaced by another. The journal is read before and after each kill: a trial in the journal is acknowledged and
must stay there unchanged. The benchmark ends after the last kill, even in the middle of a search.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.local_cluster import LocalCluster
from benchmarks.report import Bar, markdown, publish

MODULE = "benchmarks.chaos"
ROOT = Path(__file__).resolve().parents[1]
SMALL = "--device cpu --target-kept 0.7 --calibration-tokens 1500 --search-items 2 --search-text-tokens 128 \
--heldout-tokens 600 --report-items 6 --heal-minutes 0 --benchmark-items 0 --export none --threads 1 --agent random \
--trial-timeout 300"
_KINDS = ("driver", "evaluator", "node")
_COUNTS = ("trials", "lost", "duplicated", "processes left")
_SECONDS = 30.0  # after this time no process of a killed driver may be left


@dataclass
class Tally:
    """Counts of kills, acknowledged trials and faults.

    Attributes:
        kills: kills by kind of victim.
        acknowledged: digest, repeat and reward of every trial last seen in the journal, by number.
        lost: acknowledged trials that disappeared or changed.
        duplicated: trials that appear more than once, by number or by digest and repeat.
        orphans: processes left after a driver was killed.
    """

    kills: Counter[str] = field(default_factory=Counter)
    acknowledged: dict[int, tuple[object, ...]] = field(default_factory=dict)
    lost: int = 0
    duplicated: int = 0
    orphans: int = 0

    def see(self, rows: Mapping[int, list[tuple[object, ...]]]) -> None:
        """Compares the rows of the journal with those seen before, and updates the counts."""
        self.lost += sum(rows.get(number, [None])[0] != was for number, was in self.acknowledged.items())
        self.duplicated += sum(len(found) - 1 for found in rows.values())
        measured = [(digest, repeat) for found in rows.values() for digest, repeat, _ in found]
        self.duplicated += len(measured) - len(set(measured))
        self.acknowledged = {number: found[0] for number, found in rows.items()}

    def counts(self) -> tuple[int, int, int, int]:
        """The counts under the headings `_COUNTS`."""
        return len(self.acknowledged), self.lost, self.duplicated, self.orphans


def journal(path: Path) -> dict[int, list[tuple[object, ...]]]:
    """Reads digest, repeat and reward of every trial in a study, by number; two trials of one number are a fault."""
    if not path.exists():
        return {}
    query = (
        "SELECT number.value_json, digest.value_json, look.value_json, reward.value FROM trial_user_attributes number "
        "JOIN trial_user_attributes digest ON digest.trial_id = number.trial_id AND digest.key = 'schedule.digest' "
        "JOIN trial_user_attributes look ON look.trial_id = number.trial_id AND look.key = 'trial.look' "
        "LEFT JOIN trial_values reward ON reward.trial_id = number.trial_id "
        "WHERE number.key = 'trial.number'"
    )
    found: dict[int, list[tuple[object, ...]]] = {}
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=60) as connection:
        try:
            rows = connection.execute(query).fetchall()
        except sqlite3.OperationalError:  # the driver was killed before it created the tables
            return {}
    for number, *trial in rows:
        found.setdefault(int(number), []).append(tuple(trial))
    return found


class Search:
    """A search in its own process, which can be started again after a kill."""

    def __init__(self, folder: Path, model: str, evaluators: int, cluster: LocalCluster | None) -> None:
        self.folder, self._cluster = folder, cluster
        self._words = [f"--model={model}", *SMALL.split(), "--budget=100000", f"--evaluators={evaluators}"]
        self._words += [f"--ray-address={cluster.address}"] if cluster else []
        self.start()

    def start(self) -> None:
        """Starts the search, or resumes it if its folder holds a run."""
        begun = (self.folder / "config.json").exists()
        words = ["--resume", str(self.folder)] if begun else [*self._words, "--out", str(self.folder)]
        self.process = psutil.Popen(
            [sys.executable, "search.py", *words, "--quiet"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            env=self._cluster.environment if self._cluster else dict(os.environ),
        )

    def evaluators(self) -> list[psutil.Process]:
        """The evaluator processes that run now."""
        found = []
        for parent in (self.process, *(self._cluster.nodes if self._cluster else ())):
            for one in _children(parent):
                with suppress(psutil.Error):
                    if "ModelWorker" in " ".join(one.cmdline()):
                        found.append(one)
        return found

    def kill(self) -> int:
        """Sends SIGKILL to the driver; returns how many of its processes and evaluators are left after 30 s."""
        if self.process.poll() is not None:
            return 0
        family = [*_children(self.process), *self.evaluators()]
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        return len(psutil.wait_procs(family, timeout=_SECONDS)[1])


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def _kill_one(processes: list[psutil.Process], chance: random.Random) -> bool:
    try:
        chance.choice(processes).send_signal(signal.SIGKILL)
    except (IndexError, psutil.NoSuchProcess):  # none is there, or it ended in between
        return False
    return True


def rage(
    folder: Path, victims: Sequence[str], model: str, evaluators: int, seed: int, cluster: LocalCluster | None = None
) -> Tally:
    """Runs a search and kills one victim after the other at random times.

    Args:
        folder: run folder of the search.
        victims: "driver", "evaluator" or, on a cluster, "node", in the order of the kills.
        model: model, as for search.py.
        evaluators: number of evaluators, at least 1.
        seed: seed of the times and of the choice among evaluators.
        cluster: cluster with a node for all evaluators, which is added if there is none; None lets the search start its
            own Ray.

    Raises:
        RuntimeError: the search ended by itself, or no evaluator started.
    """
    chance, tally = random.Random(seed), Tally()
    if cluster and not cluster.nodes:
        cluster.add(evaluators)
    search = Search(folder, model, evaluators, cluster)
    try:
        for victim in victims:
            before = len(tally.acknowledged)
            deadline = time.monotonic() + 300
            while len(journal(folder / "study.db")) <= before and time.monotonic() < deadline:
                if search.process.poll() is not None:
                    raise RuntimeError(f"the search ended by itself with exit status {search.process.returncode}")
                time.sleep(0.2)
            time.sleep(chance.uniform(0, 2))
            tally.see(journal(folder / "study.db"))
            if victim == "evaluator":
                while not _kill_one(search.evaluators(), chance):
                    if time.monotonic() > deadline:
                        raise RuntimeError("no evaluator was there to be killed")
                    time.sleep(0.2)
            elif victim == "node":
                assert cluster, "only a cluster has nodes to kill"
                cluster.kill(cluster.nodes[0])
                cluster.add(evaluators)
            else:
                tally.orphans += search.kill()
                tally.see(journal(folder / "study.db"))
                search.start()
            tally.kills[victim] += 1
    finally:
        tally.orphans += search.kill()
    tally.see(journal(folder / "study.db"))
    return tally


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="make 4 kills")
    parser.add_argument("--write", action="store_true", help="write the table to results/")
    parser.add_argument("--kills", type=int, help="number of kills (default: 100; quick: 4)")
    parser.add_argument("--evaluators", type=int, default=2, help="number of evaluators (default: 2)")
    parser.add_argument("--model", default="random:tiny-llama", help="model (default: random:tiny-llama)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kills (default: 0)")
    given = parser.parse_args()
    kills = given.kills or (4 if given.quick else 100)
    rows, tallies = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for where, kinds in (("its own Ray", ("driver", "evaluator")), ("a cluster", ("node", "driver", "evaluator"))):
            share = kills // 2 if tallies else kills - kills // 2
            victims = list(itertools.islice(itertools.cycle(kinds), share))
            random.Random(given.seed).shuffle(victims)
            with LocalCluster() if "node" in kinds else nullcontext() as cluster:
                folder = Path(scratch) / str(len(tallies))
                tally = rage(folder, victims, given.model, given.evaluators, given.seed, cluster)
            tallies.append(tally)
            rows.append([where, *(tally.kills[kind] if kind in kinds else "" for kind in _KINDS), *tally.counts()])
            print(*rows[-1], flush=True)
    acknowledged, lost, duplicated, orphans = map(sum, zip(*(tally.counts() for tally in tallies), strict=True))
    body = markdown(("evaluators on", *(f"{kind}s killed" for kind in _KINDS), *_COUNTS), rows) + (
        f"\n\nThe processes left were counted {_SECONDS:g} s after each kill of a driver. {acknowledged} trials were "
        "acknowledged."
    )
    bars = [
        Bar("trials lost", lost, "<=", 0),
        Bar("trials duplicated", duplicated, "<=", 0),
        Bar("orphans", orphans, "<=", 0),
    ]
    publish(MODULE, "Random kills", body, bars, given.write)


if __name__ == "__main__":
    main()
