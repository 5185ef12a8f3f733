"""Run evaluation jobs on a pool of one or more evaluators: the interface between a search and its evaluators.

A pool may return results in any order; each result carries the number of its job. With one evaluator, results come one
at a time in the order of the jobs, so a search gives the same result whether that evaluator runs in this process or in
another.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from compression.schedule import Schedule
from search.evaluation.evaluator import Evaluator
from search.evaluation.score import Score

__all__ = ["Job", "Pool", "Result", "SerialPool", "measure"]


@dataclass(frozen=True)
class Job:
    """One evaluation of a schedule, with slopes toward `probe` if there is one; see `agents.Proposal`."""

    schedule: Schedule
    repeat: int = 0
    probe: Schedule | None = None

    def to_json(self) -> str:
        """The form that is sent to an evaluator in another process."""
        probe = None if self.probe is None else self.probe.to_json()
        return json.dumps({"schedule": self.schedule.to_json(), "look": self.repeat, "probe": probe})

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Inverse of `to_json`."""
        values = json.loads(text)
        probe = None if values["probe"] is None else Schedule.from_json(values["probe"])
        return cls(Schedule.from_json(values["schedule"]), values["look"], probe)


@dataclass(frozen=True)
class Result:
    """The result of a job.

    Attributes:
        score: score of the schedule.
        slopes: slopes toward the probe; None if the job had no probe, empty if there is no score or the passes failed.
    """

    score: Score
    slopes: Mapping[str, float] | None = None

    def to_json(self) -> str:
        """The form that is sent back, without the per-sequence values."""
        return json.dumps({"score": self.score.to_dict(), "slopes": self.slopes})

    @classmethod
    def from_json(cls, text: str) -> Result:
        """Inverse of `to_json`."""
        values = json.loads(text)
        return cls(Score.from_dict(values["score"]), values["slopes"])


class Pool(Protocol):
    """The interface of everything that carries out jobs."""

    @property
    def dense(self) -> Score:
        """The score of the dense model, see `search.evaluation.evaluator.ModelEvaluator`."""

    @property
    def capacity(self) -> int:
        """Number of jobs that keep the pool busy, at least 1; further jobs are accepted and wait."""

    def submit(self, number: int, job: Job) -> None:
        """Submit a job under a number that no other open job has."""

    def finished(self) -> tuple[int, Result]:
        """Wait for the next result and return it with the number of its job; each result is returned once.

        Raises:
            IndexError: no job is open.
        """


class SerialPool:
    """A pool of one evaluator in this process, which works while `finished` waits."""

    capacity = 1

    def __init__(self, evaluator: Evaluator, dense: Score) -> None:
        self.dense = dense
        self._evaluator = evaluator
        self._waiting: deque[tuple[int, Job]] = deque()

    def submit(self, number: int, job: Job) -> None:
        """See `Pool`."""
        self._waiting.append((number, job))

    def finished(self) -> tuple[int, Result]:
        """See `Pool`."""
        number, job = self._waiting.popleft()
        return number, measure(self._evaluator, job)


def measure(evaluator: Evaluator, job: Job) -> Result:
    """Carry out a job."""
    if job.probe is not None:
        return Result(*evaluator.evaluate_with_slopes(job.schedule, job.probe, job.repeat))
    [score] = evaluator.evaluate([job.schedule], repeat=job.repeat)
    return Result(score)
