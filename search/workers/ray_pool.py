"""Evaluators as Ray actors: a pool whose workers may be killed, hang or run out of memory without losing a trial.

Ray only starts processes, places them and reports dead ones. Jobs and results travel as JSON text. Ray restarts no
actor and retries no call: the pool replaces a dead worker by a new one and hands its jobs out again, each at most
twice. The pool knows workers by two methods; only `ray_pool` knows the search.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
import torch

from compression.refusal import Refusal
from compression.schedule import Schedule
from search.config import Config
from search.evaluation.pool import Job, Result
from search.evaluation.quality import Quality
from search.evaluation.score import Score
from search.experiment.experiment import Experiment, Extract
from search.runtime.errors import EvaluatorsLost
from search.workers.ray_cluster import cluster
from search.workers.remote_evaluator import RemoteEvaluator, portable_fields

__all__ = ["ModelWorker", "RayPool", "Worker", "ray_pool"]

_PER_CALL = 8  # largest number of schedules per call, when more wait than there are workers
_TRIES = 2  # workers that may die of one schedule
_STILLBORN = 3  # workers in a row that may die while starting, before any was ready
_UNLUCKY = 30  # the same after one was: a cluster notices a dead node late and sends workers there until then
_PAUSE = 1.0  # seconds between those
_MEMORY_SHARE = 0.9  # share of its part of a GPU that torch may fill; the rest is for memory outside its allocator
_LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.OutOfMemoryError,
)


class Worker(Protocol):
    """A worker that runs in a process of its own."""

    def ready(self) -> dict[str, Any]:
        """Get ready; called once, first. All workers of a pool must return the same identity."""

    def work(self, jobs: list[str]) -> list[str]:
        """The `Result` of every `Job` in order, all as JSON."""


@dataclass(eq=False)
class _Open:
    """A job without a result, and the number of workers that died while it was their only job."""

    number: int
    job: Job
    deaths: int = 0
    alone: bool = False


@dataclass(eq=False)
class _Seat:
    """A slot for a worker: its current actor and the call in progress."""

    actor: Any
    call: Any
    ready: bool = False
    jobs: list[_Open] = field(default_factory=list)
    since: float = 0.0


class RayPool:
    """See `search.evaluation.pool.Pool`. Ray must be initialized.

    Args:
        start: starts one worker and returns the handle of its actor.
        count: number of workers, at least 1.
        failed: makes the score of a schedule whose workers died or that took too long, from the reason.
        timeout: seconds after which a trial is given up and its worker killed; None waits forever.
        note: shows one line to the user.

    Attributes:
        capacity: number of jobs that keep the pool busy, which is the number of workers.
        said: the values that workers return when they are ready.

    Raises:
        ValueError: raised by a worker while it got ready.
        EvaluatorsLost: workers die before any is ready.
    """

    def __init__(
        self,
        start: Callable[[], Any],
        count: int,
        failed: Callable[[Schedule, str, float], Score],
        timeout: float | None = None,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.capacity = count
        self.said: dict[str, Any] = {}
        self._start = start
        self._failed = failed
        self._timeout = timeout
        self._note = note
        self._queue: deque[_Open] = deque()
        self._results: deque[tuple[int, Result]] = deque()
        self._stillborn = 0
        self._seats: list[_Seat] = []
        for _ in range(count):
            self._fill()
        try:
            while not any(seat.ready for seat in self._seats):
                self._wait()
        except BaseException:
            self.close()
            raise

    @property
    def dense(self) -> Score:
        """See `search.evaluation.pool.Pool`; the score that the first ready worker measured."""
        return Score.from_dict(self.said["dense"])

    def submit(self, number: int, job: Job) -> None:
        """See `search.evaluation.pool.Pool`."""
        self._queue.append(_Open(number, job))
        self._hand_out()

    def finished(self) -> tuple[int, Result]:
        """See `search.evaluation.pool.Pool`; replaces dead workers while it waits."""
        while not self._results:
            if not self._queue and not any(seat.jobs for seat in self._seats):
                raise IndexError("no job is open")
            self._wait()
            self._hand_out()
        return self._results.popleft()

    def close(self) -> None:
        """Kill the workers."""
        for seat in self._seats:
            ray.kill(seat.actor, no_restart=True)
        self._seats.clear()

    def _fill(self) -> None:
        """Start a worker; it waits for room on the cluster if there is none."""
        actor = self._start()
        self._seats.append(_Seat(actor, actor.ready.remote()))

    def _hand_out(self) -> None:
        """Give waiting jobs to idle workers: one each, or more if more jobs wait than there are workers."""
        for seat in self._seats:
            if not self._queue:
                return
            if seat.ready and seat.call is None:
                share = min(_PER_CALL, -(-len(self._queue) // len(self._seats)))
                seat.jobs = [self._queue.popleft()]
                while len(seat.jobs) < share and not seat.jobs[0].alone and not self._queue[0].alone:
                    seat.jobs.append(self._queue.popleft())
                seat.since = time.monotonic()
                seat.call = seat.actor.work.remote([one.job.to_json() for one in seat.jobs])

    def _wait(self) -> None:
        """Wait until a worker has finished, died or exceeded its time."""
        seats = {seat.call: seat for seat in self._seats if seat.call is not None}
        now = time.monotonic()
        limits = [self._limit(seat) - now for seat in seats.values() if seat.jobs and self._timeout is not None]
        done, _ = ray.wait(list(seats), timeout=max(0.0, min(limits)) if limits else None)
        for call in done:
            self._collect(seats[call])
        if not done:
            for seat in seats.values():
                if seat.jobs and self._timeout is not None and time.monotonic() >= self._limit(seat):
                    self._overdue(seat)

    def _limit(self, seat: _Seat) -> float:
        return seat.since + (self._timeout or 0.0) * len(seat.jobs)

    def _collect(self, seat: _Seat) -> None:
        try:
            value = ray.get(seat.call)
        except _LOST as error:
            self._died(seat, f"{type(error).__name__} of its evaluator")
            return
        except ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from None  # type: ignore[no-untyped-call]
        seat.call = None
        if not seat.ready:
            self._greet(seat, value)
            return
        jobs, seat.jobs = seat.jobs, []
        for one, text in zip(jobs, value, strict=True):
            self._results.append((one.number, Result.from_json(text)))

    def _greet(self, seat: _Seat, said: dict[str, Any]) -> None:
        """Accept a worker that is ready; all must have the same model and data."""
        known, own = self.said.get("identity"), said.get("identity")
        if self.said and known != own:
            raise Refusal(
                f"all evaluators must have the same model, data and precision, but one has {own}, not {known}"
            )
        self.said = self.said or said
        self._stillborn = 0
        seat.ready = True

    def _died(self, seat: _Seat, reason: str) -> None:
        """Replace a dead worker; its jobs return to the front of the queue, or fail after their last try."""
        if not seat.ready:
            self._stillborn += 1
            most = _UNLUCKY if self.said else _STILLBORN
            if self._stillborn >= most:
                raise EvaluatorsLost(f"{most} evaluators in a row died as they started; is there enough memory?")
            time.sleep(_PAUSE if self.said else 0.0)
        single = len(seat.jobs) == 1
        for one in reversed(seat.jobs):
            one.alone, one.deaths = True, one.deaths + single
            if one.deaths < _TRIES:
                self._queue.appendleft(one)
            else:
                why = f"{_TRIES} evaluators died of it, the last by {reason}; was the memory enough?"
                self._fail(one, why, seat)
        self._note(f"an evaluator died and is replaced ({reason})")
        self._replace(seat)

    def _overdue(self, seat: _Seat) -> None:
        """Kill a worker that takes too long. It is unknown which of several jobs hangs, so each then runs alone."""
        if len(seat.jobs) == 1:
            self._fail(seat.jobs[0], f"took longer than --trial-timeout {self._timeout:g} seconds", seat)
        else:
            for one in reversed(seat.jobs):
                one.alone = True
                self._queue.appendleft(one)
        ray.kill(seat.actor, no_restart=True)
        self._replace(seat)

    def _fail(self, one: _Open, reason: str, seat: _Seat) -> None:
        score = self._failed(one.job.schedule, reason, time.monotonic() - seat.since)
        self._results.append((one.number, Result(score, None if one.job.probe is None else {})))

    def _replace(self, seat: _Seat) -> None:
        self._seats.remove(seat)
        self._fill()


class ModelWorker:
    """A worker with an evaluator of its own, see `search.workers.remote_evaluator`."""

    def __init__(
        self,
        values: dict[str, Any],
        anchor: str,
        model: dict[str, str],
        sharers: int,
        threads: int,
        gpus: float,
        extract: tuple[int, int | None] | None = None,
    ):
        self._arguments = values, anchor, model, sharers
        self._threads, self._gpus = threads, gpus
        self._extract = None if extract is None else Extract(*extract)

    def ready(self) -> dict[str, Any]:
        """See `Worker`."""
        torch.set_num_threads(self._threads)
        if 0 < self._gpus < 1:
            torch.cuda.set_per_process_memory_fraction(_MEMORY_SHARE * self._gpus)
        values, anchor, model, sharers = self._arguments
        self._evaluator = RemoteEvaluator(values, Schedule.from_json(anchor), model, sharers, self._extract)
        return {"dense": self._evaluator.evaluator.dense.to_dict(), "identity": self._evaluator.experiment.identity}

    def work(self, jobs: list[str]) -> list[str]:
        """See `Worker`."""
        return [self._evaluator.work(job) for job in jobs]


@contextmanager
def ray_pool(
    experiment: Experiment, anchor: Schedule, note: Callable[[str], None], extract: Extract | None = None
) -> Iterator[RayPool]:
    """The evaluators of `experiment.config`, on its cluster or on one that starts here and ends with this context.

    Args and errors: see `search.workers.pools.search_pool`.
    """
    config = experiment.config
    gpus = (config.gpus_per_evaluator or 1.0) if experiment.device.type == "cuda" else 0.0
    with cluster(config, _wanted(config, gpus) * (config.threads or 1)) as resources:
        room = int(resources["GPU"] / gpus + 1e-6) if gpus else int(resources["CPU"] // (config.threads or 1))
        count = room if config.evaluators in (None, "auto") and config.ray_address else _wanted(config, gpus)
        if room < 1:
            raise Refusal(f"evaluators must fit on the Ray cluster, which has {resources['CPU']:g} processors")
        if room < count:
            note(f"the cluster has room for {room} of {count} evaluators; the others wait for more")
        here = len(os.sched_getaffinity(0))
        threads = config.threads or (max(1, here // count) if config.ray_address is None else 1)
        actor = ray.remote(ModelWorker).options(
            num_cpus=0 if gpus else threads, num_gpus=gpus, max_restarts=0, max_task_retries=0
        )
        plain = None if extract is None else (extract.tokens, extract.context)
        # The dtype that "auto" means here: on another machine it may mean another one.
        dtype = str(experiment.loaded.model.dtype).removeprefix("torch.")
        values = portable_fields(config) | {"dtype": dtype}
        arguments = values, anchor.to_json(), experiment.loaded.identity, count, threads, gpus, plain
        sizes = experiment.budget.sizes

        def failed(schedule: Schedule, reason: str, seconds: float) -> Score:
            return Score("failed", Quality(), sizes.size(schedule), seconds, reason)

        pool = RayPool(lambda: actor.remote(*arguments), count, failed, config.trial_timeout, note)
        try:
            if (theirs := pool.said["identity"]) != experiment.identity:
                raise Refusal(
                    f"evaluators must have the model and data of this process, but have {theirs}, not "
                    f"{experiment.identity}"
                )
            yield pool
        finally:
            pool.close()


def _wanted(config: Config, gpus: float) -> int:
    """Number of evaluators that the configuration asks for on this machine."""
    if config.evaluators != "auto":
        return int(config.evaluators or 1)
    if gpus:
        return max(1, int(torch.cuda.device_count() / gpus + 1e-6))
    return max(1, len(os.sched_getaffinity(0)) // (config.threads or 1))
