"""Several evaluators at once: agents asked while results are under way, results in any order, and an exact replay."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import agents
from agents import AgentContext
from compression.size import Size
from envs import Problem, Reward, ToyEvaluator, best_by_exhaustion, toy_menu
from search.evaluation.pool import Job, Result
from search.evaluation.quality import Quality
from search.evaluation.score import Score
from search.trials.journal import Journal, Record
from search.trials.loop import Trial, run_agent

ONE_BY_ONE = ("gradient",)  # the next proposal needs the slopes of the last
ONE_SCHEDULE = ("knapsack", "lagrangian", "uniform")
SEARCHERS = [name for name in agents.NAMES if name not in (*ONE_BY_ONE, *ONE_SCHEDULE)]
LEARNERS = ("reinforce", "evolution", "optuna-tpe", "bandit")
REWARD = Reward()


class Late:
    """A pool of so many evaluators, any of which may be the next to have a result: chance decides, by the job alone."""

    def __init__(self, problem: Problem, capacity: int, stop_after: int = -1) -> None:
        self.capacity, self.left = capacity, stop_after
        self.evaluate = ToyEvaluator(problem.menu)
        self.open: list[tuple[int, Job]] = []
        self.busy: list[int] = []
        self.dense = self.score(problem.closed_form())

    def submit(self, number: int, job: Job) -> None:
        self.open.append((number, job))

    def finished(self) -> tuple[int, Result]:
        self.busy.append(len(self.open))
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        number, job = min(self.open, key=lambda pair: hashlib.sha256(pair[1].to_json().encode()).digest())
        self.open.remove((number, job))
        slopes = None if job.probe is None else self.evaluate.slopes(job.schedule, job.probe, job.repeat)
        return number, Result(self.score(job.schedule), slopes)

    def score(self, schedule) -> Score:
        [toy] = self.evaluate([schedule])
        size = Size(toy.kept_fraction, toy.kept_fraction, toy.kept_fraction, 1, 1, 1)
        return Score("ok", Quality(state="ok", kl=toy.kl, expected_accuracy=toy.expected_accuracy), size, 0.0)


def toy() -> Problem:
    return Problem.build(toy_menu(), 0.5, levels=8)


@contextmanager
def journal(path: Path, problem: Problem) -> Iterator[Journal]:
    one = Journal(path, {"what": "toy"}, problem.names, problem.levels)
    try:
        yield one
    finally:
        one.close()


def search(path: Path, name: str, pool: Late, problem: Problem, budget: int, shards: int = 1) -> list[Trial]:
    agent = agents.make(name, problem, AgentContext(0, budget, shards))
    with journal(path, problem) as kept:
        return run_agent(agent, budget, pool, REWARD, kept)


def marked(name: str) -> object:
    """The agents whose libraries take seconds over a search are marked slow."""
    return pytest.param(name, marks=pytest.mark.slow) if name in ("optuna-gp", "optuna-qmc") else name


def told(path: Path, problem: Problem) -> list[tuple[int, str, int, int]]:
    with journal(path, problem) as kept:
        return [(one.number, *one.key, one.asked) for one in kept.told]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*map(marked, SEARCHERS)])
def test_no_evaluator_waits_for_the_rest_of_a_batch(name: str, tmp_path: Path) -> None:
    budget, count = 22 if name == "optuna-gp" else 40, 6
    problem = toy()
    pool = Late(problem, count)
    trials = search(tmp_path / "study.db", name, pool, problem, budget, shards=3)
    made = len(trials)
    assert sum(trial.proposal.cost for trial in trials) == budget
    assert [trial.number for trial in trials] == list(range(made))
    assert len({(trial.proposal.schedule.digest, trial.proposal.repeat) for trial in trials}) == made
    assert pool.busy == [count] * (made - count + 1) + list(range(count - 1, 0, -1))


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_an_agent_that_has_to_wait_is_asked_again_and_ends_within_its_budget(name: str, tmp_path: Path) -> None:
    problem = toy()
    trials = search(tmp_path / "study.db", name, Late(problem, 4), problem, 30)
    assert sum(trial.proposal.cost for trial in trials) <= 30
    assert len(trials) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_the_optimum_is_found_by_six_evaluators_as_by_one(name: str, tmp_path: Path) -> None:
    problem = toy()
    _, best = best_by_exhaustion(problem, ToyEvaluator(problem.menu), REWARD)
    trials = search(tmp_path / "study.db", name, Late(problem, 6), problem, 60)
    assert max(trial.reward for trial in trials) >= best - 1e-9  # more than the best of all levels may be found


@pytest.mark.slow
@pytest.mark.parametrize("name", [*map(marked, SEARCHERS), *ONE_BY_ONE, "lagrangian"])
def test_a_search_cut_anywhere_goes_on_as_if_it_had_not_been(name: str, tmp_path: Path) -> None:
    budget = 22 if name == "optuna-gp" else 28
    problem = toy()
    search(tmp_path / "whole.db", name, Late(problem, 5), problem, budget, shards=2)
    for stop in (3, 9, 14):  # each continues the one before
        pool = Late(problem, 5, stop)
        try:
            search(tmp_path / "cut.db", name, pool, problem, budget, shards=2)
        except KeyboardInterrupt:
            assert pool.open
    search(tmp_path / "cut.db", name, Late(problem, 5), problem, budget, shards=2)
    assert told(tmp_path / "cut.db", problem) == told(tmp_path / "whole.db", problem)


def test_a_search_goes_on_with_another_number_of_evaluators(tmp_path: Path) -> None:
    problem = toy()
    for capacity, stop in ((5, 8), (1, 8), (3, -1)):
        try:
            trials = search(tmp_path / "study.db", "evolution", Late(problem, capacity, stop), problem, 40)
        except KeyboardInterrupt:
            continue
    assert len(trials) == 40
    assert sorted(number for number, *_ in told(tmp_path / "study.db", problem)) == list(range(40))


def test_a_journal_from_before_results_could_overtake_each_other_still_replays(tmp_path: Path) -> None:
    problem, path = toy(), tmp_path / "study.db"
    search(path, "evolution", Late(problem, 1, -1), problem, 12)
    before = told(path, problem)
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM trial_user_attributes WHERE key = 'trial.asked'")
    assert told(path, problem) == before
    pool = Late(problem, 1)
    agent = agents.make("evolution", problem, AgentContext(0, 12))
    with journal(path, problem) as kept:
        assert len(run_agent(agent, 12, pool, REWARD, kept)) == 12
    assert pool.busy == []


def test_a_journal_of_another_agent_is_refused(tmp_path: Path) -> None:
    problem, path = toy(), tmp_path / "study.db"
    search(path, "reinforce", Late(problem, 1), problem, 6)
    with pytest.raises(ValueError, match="the resumed search does not propose"):
        search(path, "random", Late(problem, 1), problem, 6)
    with pytest.raises(ValueError, match="a trial 0 that the resumed search does not propose"):
        search(path, "lagrangian", Late(problem, 1), problem, 6)


def test_a_fingerprint_lacks_what_came_later_and_counts_as_having_its_default(tmp_path: Path) -> None:
    before = {"configuration": {"agent": "random", "seed": 1}, "reward": {"kl_weight": 1.0}, "model": "abc"}
    defaults = {"configuration": {"new": 3, "seed": 0}, "reward": {"late_weight": 0.0}}
    now = {
        "configuration": {"agent": "random", "seed": 1, "new": 3},
        "reward": {"kl_weight": 1.0, "late_weight": 0.0},
        "model": "abc",
    }
    one = Journal(tmp_path / "study.db", before)
    one.record(Record(0, "d", "{}", None, {"kl": 1.0}, -1.0, "ok"))
    one.close()
    again = Journal(tmp_path / "study.db", now, defaults=defaults)
    assert len(again.records) == 1
    again.close()
    changed = json.loads(json.dumps(now))
    changed["configuration"]["new"] = 4
    with pytest.raises(ValueError, match=r"configuration\.new was 3, is 4"):
        Journal(tmp_path / "study.db", changed, defaults=defaults)
    with pytest.raises(ValueError, match=r"configuration\.new was absent, is 3"):
        Journal(tmp_path / "study.db", now)
