"""Random kills of driver, evaluators and nodes, and what is left: trials acknowledged, lost, duplicated, orphans.

    python -m benchmarks.chaos [--quick] [--write] [--kills N] [--evaluators N] [--model NAME] [--seed N]

A search runs as a user runs it, in a process of its own with evaluators in theirs: for half of the kills with a Ray of
its own, for the others on a cluster whose evaluators are on one node. After a random time the driver, one evaluator or
the node with all of them gets SIGKILL; a killed driver is started again with --resume, and in the place of a killed
node comes another. Before and after each kill the journal is read: a trial in it is acknowledged and has to stay there
as it is. Ends when the kills are done, in the middle of a search or not.
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
_SECONDS = 30.0  # after which nothing of a killed driver may be left


@dataclass
class Tally:
    """What was counted."""

    kills: Counter[str] = field(default_factory=Counter)
    acknowledged: dict[int, tuple[object, ...]] = field(default_factory=dict)
    lost: int = 0
    duplicated: int = 0
    orphans: int = 0

    def see(self, rows: Mapping[int, list[tuple[object, ...]]]) -> None:
        """Compare the journal with what was in it before."""
        self.lost += sum(rows.get(number, [None])[0] != was for number, was in self.acknowledged.items())
        self.duplicated += sum(len(found) - 1 for found in rows.values())
        shards = [(digest, repeat) for found in rows.values() for digest, repeat, _ in found]
        self.duplicated += len(shards) - len(set(shards))
        self.acknowledged = {number: found[0] for number, found in rows.items()}

    def counts(self) -> tuple[int, int, int, int]:
        """Under the headings `_COUNTS`."""
        return len(self.acknowledged), self.lost, self.duplicated, self.orphans


def journal(path: Path) -> dict[int, list[tuple[object, ...]]]:
    """Digest, look and reward of every trial in a study, by number; more than one a number would be a fault."""
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
        except sqlite3.OperationalError:  # killed before the tables were made
            return {}
    for number, *trial in rows:
        found.setdefault(int(number), []).append(tuple(trial))
    return found


class Search:
    """A search in a process of its own, started again after it was killed."""

    def __init__(self, folder: Path, model: str, evaluators: int, cluster: LocalCluster | None) -> None:
        self.folder, self._cluster = folder, cluster
        self._words = [f"--model={model}", *SMALL.split(), "--budget=100000", f"--evaluators={evaluators}"]
        self._words += [f"--ray-address={cluster.address}"] if cluster else []
        self.start()

    def start(self) -> None:
        """Begin, or go on."""
        begun = (self.folder / "config.json").exists()
        words = ["--resume", str(self.folder)] if begun else [*self._words, "--out", str(self.folder)]
        self.process = psutil.Popen(
            [sys.executable, "search.py", *words, "--quiet"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            env=self._cluster.environment if self._cluster else dict(os.environ),
        )

    def evaluators(self) -> list[psutil.Process]:
        """Its evaluators as they are now."""
        found = []
        for parent in (self.process, *(self._cluster.nodes if self._cluster else ())):
            for one in _children(parent):
                with suppress(psutil.Error):
                    if "ModelWorker" in " ".join(one.cmdline()):
                        found.append(one)
        return found

    def kill(self) -> int:
        """SIGKILL to the driver; how many of its processes and evaluators are left after half a minute."""
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


def rage(
    folder: Path, victims: Sequence[str], model: str, evaluators: int, seed: int, cluster: LocalCluster | None = None
) -> Tally:
    """Kills at random times.

    Args:
        victims: "driver", "evaluator" or, on a cluster, "node", one after the other.
        cluster: where the evaluators run, on a node that is added here; None has Ray started by the search.
    """
    chance, tally = random.Random(seed), Tally()
    if cluster:
        cluster.add(evaluators)
    search = Search(folder, model, evaluators, cluster)
    try:
        for victim in victims:
            before = len(tally.acknowledged)
            deadline = time.monotonic() + 300
            while len(journal(folder / "study.db")) <= before and time.monotonic() < deadline:
                if search.process.poll() is not None:
                    raise RuntimeError(f"the search ended by itself with {search.process.returncode}")
                time.sleep(0.2)
            time.sleep(chance.uniform(0, 2))
            tally.see(journal(folder / "study.db"))
            if victim == "evaluator":
                while not (running := search.evaluators()) and time.monotonic() < deadline:
                    time.sleep(0.2)
                chance.choice(running).send_signal(signal.SIGKILL)
            elif victim == "node":
                assert cluster, "nodes are of a cluster"
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
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--kills", type=int)
    parser.add_argument("--evaluators", type=int, default=2)
    parser.add_argument("--model", default="random:tiny-llama")
    parser.add_argument("--seed", type=int, default=0)
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
        f"\n\nProcesses left are counted {_SECONDS:g} s after a driver was killed; {acknowledged} trials acknowledged."
    )
    bars = [
        Bar("trials lost", lost, "<=", 0),
        Bar("trials duplicated", duplicated, "<=", 0),
        Bar("orphans", orphans, "<=", 0),
    ]
    publish(MODULE, "Random kills", body, bars, given.write)


if __name__ == "__main__":
    main()
