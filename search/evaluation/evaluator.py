"""Evaluate schedules: apply them to the model and measure scores. A search reaches the model only through an evaluator.

`search.trials.loop.run_agent` handles the budget, the replay of known scores and the journal around an evaluator, in
the same way for every agent. Several evaluators working at the same time form a pool, see `search.evaluation.pool`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from statistics import fmean
from types import MappingProxyType
from typing import Protocol, TypeVar

import torch
from torch import nn

from compression.calibration.slopes import watch_slopes
from compression.decomposition.apply import ScheduleApplier
from compression.decomposition.factors import FactorStore
from compression.refusal import Refusal
from compression.schedule import Schedule
from compression.sites import members, put_modules, replaced, units
from compression.size import SizeModel
from search.evaluation.early_stopping import clearly_worse
from search.evaluation.prefix_reuse import HiddenStates, prefix_keys
from search.evaluation.quality import Quality
from search.evaluation.score import Score
from search.evaluation.workload import RunForward, ShouldStop, Workload, run_directly
from search.runtime.memory import give_back_memory, is_out_of_memory

__all__ = ["REUSE_BYTES", "Evaluator", "ModelEvaluator", "Scoring"]

REUSE_BYTES = 512 * 2**20
"""Default memory limit for stored hidden states, in bytes."""
Value = TypeVar("Value")
_NO_ROOM = "even one row at a time; use fewer --search-text-tokens, fewer evaluators on the device, or a larger device"


class Scoring(Protocol):
    """The part of an evaluator that gives scores."""

    def evaluate(self, schedules: Sequence[Schedule], rival: Score | None = None, repeat: int = 0) -> list[Score]:
        """Score every schedule, in order.

        Args:
            rival: a schedule that is clearly worse than this score may be measured only in part.
            repeat: number of the evaluation of the same schedule: 0, 1, … use different workloads until all have been
                used.
        """


class Evaluator(Scoring, Protocol):
    """The interface of everything that scores schedules."""

    def slopes(self, schedule: Schedule, toward: Schedule, repeat: int = 0) -> dict[str, float]:
        """First-order change of KL if one site or unit alone switches from `schedule` to its choice in `toward`.

        Returns:
            The change in nats per token by the name of the site or unit, for those where the two schedules differ;
            empty if the passes fail.
        """

    def evaluate_with_slopes(
        self, schedule: Schedule, toward: Schedule, repeat: int = 0
    ) -> tuple[Score, dict[str, float]]:
        """The score of a schedule and its slopes, on the same workload; no slopes if there is no score."""


class ModelEvaluator:
    """Scores schedules on one model in memory.

    With several workloads, each evaluation of a schedule uses one of them: the digest of the schedule selects the
    first, and each repeat uses the next. A search thus covers the text of all workloads, while each evaluation costs
    one. A control variate corrects for workloads that are easier or harder than average: the anchor is measured once
    on all of them, and the mean of its values minus its value on the workload used is added to the estimate.

    Args:
        model: the dense model. Schedules are applied to it in place; it is dense again after `close`.
        store: the factors of its sites.
        workloads: the workloads to measure on. The dense model is measured on them here, as their reference.
        anchor: the schedule that the control variate is based on; required with two workloads or more.
        reuse_bytes: memory limit in bytes for hidden states that later schedules with the same first blocks reuse, see
            `search.evaluation.prefix_reuse.HiddenStates`; 0 computes every pass from the first block. Scores are equal
            bit for bit either way.
        packed: measure with the packed tensors that a schedule stores. Otherwise plain cores are used, which compute
            the same function and are quicker to swap.
        sizes: the sizes of the model's schedules; None counts numbers as they are in memory.
        ends: modules that store the embedding and the head, by name. All schedules but the dense one are measured with
            them in the model; no hidden states are reused then.
        repair: applies a schedule to the dense model in place, repairs it, and returns the modules it replaced (see
            `compression.decomposition.repair.repair_`). Scores are then those of the repaired model, at many times the
            cost.
        times: gives the time fraction of a schedule; without it `Score.time_fraction` is NaN.
        progress: called after each pass over a workload that is made here: one of the dense model, and with several
            workloads one of the anchor.

    Attributes:
        dense: score of the dense model; its `kl` and `expected_accuracy` are means over the workloads.
        states: the stored hidden states.

    Raises:
        ValueError: there is no workload, there are several without an anchor, or the anchor gives non-finite logits.
    """

    def __init__(
        self,
        model: nn.Module,
        store: FactorStore,
        workloads: Sequence[Workload],
        anchor: Schedule | None = None,
        reuse_bytes: int = REUSE_BYTES,
        packed: bool = False,
        sizes: SizeModel | None = None,
        ends: Mapping[str, nn.Module] = MappingProxyType({}),
        repair: Callable[[Schedule], Mapping[str, nn.Module]] | None = None,
        times: Callable[[Schedule], float] | None = None,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        if not workloads or (len(workloads) > 1 and anchor is None):
            raise Refusal(
                f"an evaluator needs one workload, or several and an anchor; got {len(workloads)} without anchor"
            )
        self._model = model
        self._repair = repair
        self._times = times
        self._workloads = list(workloads)
        self._applier = ScheduleApplier(model, store, packed)
        self._sizes = sizes or SizeModel(model, store.sites)
        self._ends = ends
        self._sites = store.sites
        self.states = HiddenStates(
            model, store.sites, sum(one.padded_tokens for one in workloads), 0 if ends else reuse_bytes
        )
        self.states.verify()
        self._dense = dense = Schedule.dense(tuple(site.name for site in store.sites))
        start = time.perf_counter()
        shards = range(len(workloads))
        qualities = []
        for shard in shards:
            qualities.append(self._with_room(shard, partial(self._refer, shard)))
            progress()
        size, seconds = self._sizes.size(dense), time.perf_counter() - start
        self.dense = Score("ok", qualities[0], size, seconds, "", 0, *_controls(qualities)[0], self._time(dense))
        self._controls = [(0.0, 0.0)] * len(workloads)
        if anchor is not None and len(workloads) > 1:
            measured = []
            for shard in shards:
                measured.append(self._with_room(shard, partial(self._measure, anchor, shard)))
                progress()
            self._controls = _controls(measured)

    def evaluate(self, schedules: Sequence[Schedule], rival: Score | None = None, repeat: int = 0) -> list[Score]:
        """Score every schedule, in order. An evaluation that raises gives a score in state "failed" without numbers.

        Args:
            rival: a full score of this evaluator. A schedule evaluated on the same workload is stopped as soon as it is
                clearly worse, see `search.evaluation.early_stopping.clearly_worse`; on another workload it is measured
                in full.
            repeat: selects the workload, at least 0, see the class; workloads recur after as many repeats as there are
                workloads.

        Raises:
            ValueError: a schedule does not fit the model, or the rival is not a full score of this evaluator.
        """
        return [self._evaluate(schedule, rival, repeat) for schedule in schedules]

    def slopes(self, schedule: Schedule, toward: Schedule, repeat: int = 0) -> dict[str, float]:
        """See `Evaluator`. Costs about three evaluations: a backward pass, and the outputs of the other choices.

        All values are NaN if the passes give non-finite numbers. The result is empty if a pass raises, for example
        when memory runs out; agents treat that as a failed pass and continue.
        """
        shard = self._shard(schedule, repeat)
        try:
            return self._with_room(shard, partial(self._slopes, schedule, toward, shard))[0]
        except (RuntimeError, MemoryError):
            return {}

    def evaluate_with_slopes(
        self, schedule: Schedule, toward: Schedule, repeat: int = 0
    ) -> tuple[Score, dict[str, float]]:
        """See `Evaluator`. Costs as much as `slopes`, since one pass gives both, unless scores are of repaired models.

        If that pass raises, the schedule is scored without slopes.
        """
        shard, start = self._shard(schedule, repeat), time.perf_counter()
        if alike := self._repair is None and not self._ends:  # both are of the same model
            with suppress(RuntimeError, MemoryError):
                slopes, quality = self._with_room(shard, partial(self._slopes, schedule, toward, shard))
                score = self._score(schedule, quality, quality.state, shard, start)
                return score, slopes if quality.state == "ok" else {}
        score = self._evaluate(schedule, None, repeat)
        return score, {} if alike or score.state != "ok" else self.slopes(schedule, toward, repeat)

    def _slopes(self, schedule: Schedule, toward: Schedule, shard: int) -> tuple[dict[str, float], Quality]:
        workload = self._referenced(shard)
        with self.states.watch():
            self._apply(schedule)
        others = {
            unit.name: self._applier.replacement(unit, toward)
            for unit in units(self._sites)
            if any(toward[site.name] != schedule[site.name] for site in members(unit))
        }
        with watch_slopes(self._model, others) as sums:
            quality = workload.descend(self._model)
        return sums, quality

    def score_as_is(self, schedule: Schedule) -> Score:
        """Score the model in its present state on the first workload.

        Call this after `close`. The caller must have replaced the sites as `schedule` says.
        """
        start = time.perf_counter()
        with self._stored_ends(schedule):
            quality = self._workloads[0].measure(self._model)
        return Score(quality.state, quality, self._sizes.size(schedule), time.perf_counter() - start)

    def close(self) -> None:
        """Make the model dense again, bit for bit, and release the stored hidden states."""
        self.states.forget()
        self._applier.restore_()

    def _evaluate(self, schedule: Schedule, rival: Score | None, repeat: int) -> Score:
        shard = self._shard(schedule, repeat)
        should_stop = partial(_lost, rival.quality) if rival is not None and rival.shard == shard else None
        start = time.perf_counter()
        reason = ""
        try:
            quality = self._with_room(shard, partial(self._measure, schedule, shard, should_stop))
            state = quality.state
        except (RuntimeError, MemoryError) as error:
            quality, state = Quality(), "failed"
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            if is_out_of_memory(error):
                reason += f" ({_NO_ROOM})"
        return self._score(schedule, quality, state, shard, start, reason)

    def _score(
        self, schedule: Schedule, quality: Quality, state: str, shard: int, start: float, reason: str = ""
    ) -> Score:
        size, seconds = self._sizes.size(schedule), time.perf_counter() - start
        return Score(state, quality, size, seconds, reason, shard, *self._controls[shard], self._time(schedule))

    def _measure(self, schedule: Schedule, shard: int, should_stop: ShouldStop | None = None) -> Quality:
        workload = self._referenced(shard)
        with self._following(schedule) as run_forward, self._stored_ends(schedule):
            return workload.measure(self._model, run_forward, should_stop)

    def _refer(self, shard: int) -> Quality:
        with self._following(self._dense) as run_forward:
            return self._workloads[shard].reference(self._model, run_forward)

    def _referenced(self, shard: int) -> Workload:
        if not self._workloads[shard].has_reference:
            self._refer(shard)
        return self._workloads[shard]

    def _shard(self, schedule: Schedule, repeat: int) -> int:
        return schedule.shard(repeat, len(self._workloads))

    def _with_room(self, shard: int, work: Callable[[], Value]) -> Value:
        """Call `work`; whenever memory runs out, halve the batches and call it again, down to single rows.

        Smaller batches need a new reference, which differs from the old one by rounding only.
        """
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                smaller = self._workloads[shard].halved() if is_out_of_memory(error) else None
                if smaller is None:
                    raise
            # This is outside the handler because the traceback of the exception keeps tensors alive.
            self._workloads[shard] = smaller
            self.states.forget()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _time(self, schedule: Schedule) -> float:
        return self._times(schedule) if self._times else math.nan

    def _stored_ends(self, schedule: Schedule) -> AbstractContextManager[None]:
        """Inside the context, the ends are as they are stored, unless the schedule is the dense one."""
        return replaced(self._model, {} if all(choice.is_dense for _, choice in schedule) else self._ends)

    @contextmanager
    def _following(self, schedule: Schedule) -> Iterator[RunForward]:
        """Apply `schedule` to the model; yields the function that runs its forward passes."""
        if self._repair is not None and any(not choice.is_dense for _, choice in schedule):
            self._applier.restore_()
            taken = self._repair(schedule)
            try:
                yield run_directly
            finally:
                put_modules(self._model, taken)
            return
        with self.states.watch():
            self._apply(schedule)
            yield partial(self.states, prefix_keys(schedule, self._sites, self.states.blocks))

    def _apply(self, schedule: Schedule) -> None:
        self._applier.apply_(schedule)
        give_back_memory()  # what decompositions took


def _lost(rival: Quality, seen: Quality, checks: int) -> bool:
    return clearly_worse(seen, rival, checks)


def _controls(qualities: Sequence[Quality]) -> list[tuple[float, float]]:
    """Control variates: for each workload, the anchor's mean minus its value there, for KL and expected accuracy."""
    if any(quality.state != "ok" for quality in qualities):
        raise Refusal("the anchor schedule gives NaN or infinite logits, so different workloads cannot be compared")
    kl = [quality.kl for quality in qualities]
    correct = [quality.expected_accuracy for quality in qualities]
    return [(fmean(kl) - one, fmean(correct) - other) for one, other in zip(kl, correct, strict=True)]
