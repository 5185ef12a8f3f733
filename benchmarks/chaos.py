"""Random kills of driver and evaluators, and what is left afterwards: trials acknowledged, lost, duplicated, orphans.

    python -m benchmarks.chaos [--quick] [--write] [--kills N] [--evaluators N] [--model NAME] [--seed N]

A search runs as a user runs it, in a process of its own with evaluators in theirs. After a random time either the
driver or one evaluator gets SIGKILL; a killed driver is started again with --resume. Before and after each kill the
journal is read: a trial in it is acknowledged and has to stay there as it is. A node is not killed here: its death is
that of its evaluators. Ends when the kills are done, in the middle of a search or not.
"""

from __future__ import annotations

import argparse
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.report import Bar, markdown, publish

MODULE = "benchmarks.chaos"
ROOT = Path(__file__).resolve().parents[1]
SMALL = "--device cpu --target-kept 0.7 --calibration-tokens 1500 --search-items 2 --search-text-tokens 128 \
--heldout-tokens 600 --report-items 6 --threads 1 --agent random --trial-timeout 300"
_SECONDS = 30.0  # after which nothing of a killed driver may be left


@dataclass
class Tally:
    """What was counted."""

    kills: dict[str, int] = field(default_factory=lambda: {"driver": 0, "evaluator": 0})
    acknowledged: dict[int, tuple[str, object]] = field(default_factory=dict)
    lost: int = 0
    duplicated: int = 0
    orphans: int = 0

    def see(self, rows: Mapping[int, list[tuple[str, object]]]) -> None:
        """Compare the journal with what was in it before."""
        self.lost += sum(rows.get(number, [None])[0] != was for number, was in self.acknowledged.items())
        self.duplicated += sum(len(found) - 1 for found in rows.values())
        looks = [(digest, look) for found in rows.values() for digest, look in found]
        self.duplicated += len(looks) - len(set(looks))
        self.acknowledged = {number: found[0] for number, found in rows.items()}


def journal(path: Path) -> dict[int, list[tuple[str, object]]]:
    """Digest and look of every trial in a study, by number; more than one a number would be a fault."""
    if not path.exists():
        return {}
    query = (
        "SELECT number.value_json, digest.value_json, look.value_json FROM trial_user_attributes number "
        "JOIN trial_user_attributes digest ON digest.trial_id = number.trial_id AND digest.key = 'schedule.digest' "
        "JOIN trial_user_attributes look ON look.trial_id = number.trial_id AND look.key = 'trial.look' "
        "WHERE number.key = 'trial.number'"
    )
    found: dict[int, list[tuple[str, object]]] = {}
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=60) as connection:
        try:
            rows = connection.execute(query).fetchall()
        except sqlite3.OperationalError:  # killed before the tables were made
            return {}
    for number, digest, look in rows:
        found.setdefault(int(number), []).append((digest, look))
    return found


class Search:
    """A search in a process of its own, started again after it was killed."""

    def __init__(self, folder: Path, model: str, evaluators: int) -> None:
        self.folder = folder
        self._words = [f"--model={model}", *SMALL.split(), "--budget=100000", f"--evaluators={evaluators}"]
        self.start()

    def start(self) -> None:
        """Begin, or go on."""
        begun = (self.folder / "config.json").exists()
        words = ["--resume", str(self.folder)] if begun else [*self._words, "--out", str(self.folder)]
        self.process = psutil.Popen(
            [sys.executable, "search.py", *words, "--quiet"], cwd=ROOT, stdout=subprocess.DEVNULL
        )

    def evaluators(self) -> list[psutil.Process]:
        """Its evaluators as they are now."""
        try:
            return [one for one in self.process.children(recursive=True) if "ModelWorker" in " ".join(one.cmdline())]
        except psutil.Error:
            return []

    def kill(self) -> int:
        """SIGKILL to the driver; how many of its processes are left after half a minute."""
        if self.process.poll() is not None:
            return 0
        family = self.process.children(recursive=True)
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        return len(psutil.wait_procs(family, timeout=_SECONDS)[1])


def rage(folder: Path, kills: int, model: str, evaluators: int, seed: int) -> Tally:
    """So many kills at random times, every other one of an evaluator, in a random order."""
    chance, tally = random.Random(seed), Tally()
    victims = [("driver", "evaluator")[number % 2] for number in range(kills)]
    chance.shuffle(victims)
    search = Search(folder, model, evaluators)
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
    with tempfile.TemporaryDirectory() as folder:
        tally = rage(Path(folder) / "run", kills, given.model, given.evaluators, given.seed)
    body = (
        markdown(("kills of", "times"), [*tally.kills.items()])
        + f"\n\n{len(tally.acknowledged)} trials acknowledged, {tally.lost} lost, {tally.duplicated} duplicated; "
        + (f"{tally.orphans} processes left {_SECONDS:g} s after a driver was killed.")
    )
    bars = [
        Bar("trials lost", tally.lost, "<=", 0),
        Bar("trials duplicated", tally.duplicated, "<=", 0),
        Bar("orphans", tally.orphans, "<=", 0),
    ]
    publish(MODULE, "Random kills", body, bars, given.write)


if __name__ == "__main__":
    main()
