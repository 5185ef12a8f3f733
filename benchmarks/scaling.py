"""Measures how the search scales with the number of evaluators, with simulated evaluators of two seconds.

    python -m benchmarks.scaling [--quick] [--write] [--seconds S] [--most N] [--agents LIST]

A simulated evaluator takes wall time but no CPU time. `Timed` is a pool like any other, so agent, journal and search
run as usual and the clock shows their cost. Efficiency is the time that evaluators spent evaluating over the time that
they could have spent, without the filling at the start and the draining at the end of the search. The CPU time of the
driver is reported separately from that of the agent, which differs by agent and grows with the number of trials. Both
reduce the efficiency.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import agents
from agents import AgentContext
from benchmarks.report import Bar, markdown, publish
from compression.schedule import Schedule
from compression.size import Size
from envs import Problem, Reward, ToyEvaluator, toy_menu
from search.evaluation.pool import Job, Result
from search.evaluation.quality import Quality
from search.evaluation.score import Score
from search.trials.journal import Journal
from search.trials.loop import run_agent

MODULE = "benchmarks.scaling"
BLOCKS = 30


@dataclass
class Timed:
    """A pool of evaluators that each take `seconds` per trial; the scores come from the toy."""

    problem: Problem
    capacity: int
    seconds: float
    own: float = 0.0  # CPU seconds of the toy, which do not count for the driver
    spans: list[tuple[float, float]] = field(default_factory=list)  # begin and end of every evaluation

    def __post_init__(self) -> None:
        self._evaluate = ToyEvaluator(self.problem.menu)
        self._running: list[tuple[float, int, Job]] = []
        self.dense = self._score(self.problem.closed_form())

    def submit(self, number: int, job: Job) -> None:
        """See `search.evaluation.pool.Pool`. Durations differ by up to 10 %, so results may overtake each other."""
        now = time.perf_counter()
        spread = 1 + 0.1 * (int(job.schedule.digest[:4], 16) / 0xFFFF - 0.5)
        self.spans.append((now, now + spread * self.seconds))
        heapq.heappush(self._running, (self.spans[-1][1], number, job))

    def finished(self) -> tuple[int, Result]:
        """See `search.evaluation.pool.Pool`."""
        end, number, job = heapq.heappop(self._running)
        time.sleep(max(0.0, end - time.perf_counter()))
        start = time.process_time()
        result = Result(self._score(job.schedule))
        self.own += time.process_time() - start
        return number, result

    def _score(self, schedule: Schedule) -> Score:
        [toy] = self._evaluate([schedule])
        size = Size(toy.kept_fraction, toy.kept_fraction, toy.kept_fraction, 1, 1, 1)
        quality = Quality(state="ok", kl=toy.kl, expected_accuracy=toy.expected_accuracy, tokens=1)
        return Score("ok", quality, size, self.seconds)


@dataclass(frozen=True)
class Figures:
    """Figures of one simulated search: efficiency, CPU ms per trial of driver and agent, and number of trials."""

    efficiency: float
    driver: float
    agent: float
    trials: int


class Clocked:
    """Wraps an agent and counts the CPU seconds of its methods."""

    def __init__(self, agent: agents.Agent) -> None:
        self._agent, self.seconds = agent, 0.0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._agent, name)
        if not callable(value):
            return value

        def timed(*arguments: Any) -> Any:
            start = time.process_time()
            try:
                return value(*arguments)
            finally:
                self.seconds += time.process_time() - start

        return timed


def simulate(name: str, count: int, seconds: float, rounds: int) -> Figures:
    """Runs a search by one agent on `count` evaluators, with `rounds` trials per evaluator."""
    problem = Problem.build(toy_menu(BLOCKS), 0.5)
    budget = rounds * count
    pool = Timed(problem, count, seconds)
    agent = Clocked(agents.make(name, problem, AgentContext(0, budget)))
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "study.db", {}, problem.names, problem.levels)
        start = time.process_time()
        trials = run_agent(agent, budget, pool, Reward(), journal)
        spent = time.process_time() - start
        journal.close()
    # The time from the moment when all evaluators have work until the last trial is handed out.
    first, last = pool.spans[count - 1][0], pool.spans[-1][0]
    busy = sum(max(0.0, min(end, last) - max(begin, first)) for begin, end in pool.spans)
    driver, thinking = (1e3 * seconds / len(trials) for seconds in (spent - pool.own - agent.seconds, agent.seconds))
    return Figures(busy / (count * (last - first)), driver, thinking, len(trials))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="use two agents and two numbers of evaluators")
    parser.add_argument("--write", action="store_true", help="write the table to results/")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds per evaluation (default: 2)")
    parser.add_argument("--most", type=int, default=256, help="largest number of evaluators (default: 256)")
    parser.add_argument("--agents", default="random,reinforce,evolution,optuna-tpe", help="agents, comma-separated")
    given = parser.parse_args()
    names = given.agents.split(",")[: 2 if given.quick else None]
    counts = [count for count in ((16, 64) if given.quick else (1, 4, 16, 64, 256)) if count <= given.most]
    rounds = {count: 4 if given.quick or count > 64 else 8 for count in counts}
    rows, bars = [], []
    for name, count in itertools.product(names, counts):
        got = simulate(name, count, given.seconds, rounds[count])
        rows.append((name, count, got.trials, f"{got.efficiency:.1%}", f"{got.driver:.1f}", f"{got.agent:.1f}"))
        print(*rows[-1], flush=True)
        if count == 64:
            bars.append(Bar(f"efficiency of 64 simulated evaluators, {name}", got.efficiency, ">=", 0.9))
            bars.append(Bar(f"driver ms a trial, {name}", got.driver, "<=", 5.0))
    body = f"Simulated evaluators take {given.seconds:g} s per trial, for schedules of {BLOCKS} blocks:\n\n"
    body += markdown(("agent", "evaluators", "trials", "efficiency", "driver ms/trial", "agent ms/trial"), rows)
    publish(MODULE, "Scaling with the number of evaluators", body, bars, given.write)


if __name__ == "__main__":
    main()
