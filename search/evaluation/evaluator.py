"""Evaluators: schedules in, scores out, batch first. The only door to the model.

Budget, replay of known scores and the journal stand around an evaluator in `search.trials.loop.run_agent`, the same for
every agent; several evaluators at work at once are a pool, see `search.evaluation.pool`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import fmean
from typing import Protocol, TypeVar

import torch
from torch import nn

from compression.calibration.slopes import watch_slopes
from compression.decomposition.apply import ScheduleApplier
from compression.decomposition.factors import FactorStore
from compression.refusal import Refusal
from compression.schedule import Schedule
from compression.sites import put_modules
from compression.size import SizeModel
from search.evaluation.early_stopping import clearly_worse
from search.evaluation.prefix_reuse import HiddenStates, prefix_keys
from search.evaluation.quality import Quality
from search.evaluation.score import Score
from search.evaluation.workload import RunForward, ShouldStop, Workload, is_out_of_memory, run_directly

__all__ = ["REUSE_BYTES", "Evaluator", "ModelEvaluator"]

REUSE_BYTES = 512 * 2**20
"""Memory for hidden states, unless said otherwise."""
Value = TypeVar("Value")
_NO_ROOM = "even one row at a time; use fewer --search-text-tokens, fewer evaluators on the device, or a larger one"


class Evaluator(Protocol):
    """Anything that scores schedules."""

    def evaluate(self, schedules: Sequence[Schedule], rival: Score | None = None, repeat: int = 0) -> list[Score]:
        """One score per schedule, in order. With a rival, a schedule clearly worse than it may be given up early.

        Looks 0, 1, … at one schedule are on different workloads, as long as there are that many.
        """

    def slopes(self, schedule: Schedule, toward: Schedule, repeat: int = 0) -> dict[str, float]:
        """To first order, what KL does when a site of `schedule` alone takes its choice in `toward`, nats per token.

        By name, for the sites where the two differ; nothing if the passes fail.
        """


class ModelEvaluator:
    """Scores schedules on one live model.

    With several workloads every look at a schedule is on one of them, picked by its digest and moved on by the number
    of the look, so a search sees all their text at the price of one. What makes a workload easy or hard is taken out by
    a control variate: the anchor is measured on all of them once, and its mean minus its value on the workload used is
    added to the estimate.

    Args:
        model: the dense model; it follows one schedule after the other and is dense again after `close`.
        store: its factors.
        workloads: what is measured; referenced to the dense model here.
        anchor: the schedule that all others are compared through; needed with two workloads or more.
        reuse_bytes: limit of memory for hidden states that later schedules with the same first blocks start from, see
            `search.evaluation.prefix_reuse.HiddenStates`; 0 computes every pass from the first block. Scores are the
            same bit for bit.
        packed: measure the tensors that a schedule stores; otherwise plain cores: the same function, quicker to swap.
        repair: makes the dense model follow a schedule in place, repaired, and returns the modules it took out (as
            `compression.decomposition.repair.repair_`); scores are then those of the repaired model, at many times the
            price.
        times: time fraction of a schedule.

    Attributes:
        dense: score of the untouched model; its `kl` and `expected_accuracy` are means over the workloads.
        states: the hidden states kept.

    Raises:
        ValueError: no workload, or several without an anchor; an anchor without finite figures.
    """

    def __init__(
        self,
        model: nn.Module,
        store: FactorStore,
        workloads: Sequence[Workload],
        anchor: Schedule | None = None,
        reuse_bytes: int = REUSE_BYTES,
        packed: bool = False,
        repair: Callable[[Schedule], Mapping[str, nn.Module]] | None = None,
        times: Callable[[Schedule], float] | None = None,
    ) -> None:
        if not workloads or (len(workloads) > 1 and anchor is None):
            raise Refusal(f"{len(workloads)} workloads: one is needed, and an anchor schedule for more than one")
        self._model = model
        self._repair = repair
        self._times = times
        self._workloads = list(workloads)
        self._applier = ScheduleApplier(model, store, packed)
        self._sizes = SizeModel(model, store.sites)
        self._sites = store.sites
        self.states = HiddenStates(model, store.sites, sum(one.padded_tokens for one in workloads), reuse_bytes)
        self.states.verify()
        self._dense = dense = Schedule.dense(tuple(site.name for site in store.sites))
        start = time.perf_counter()
        shards = range(len(workloads))
        qualities = [self._with_room(shard, partial(self._refer, shard)) for shard in shards]
        size, seconds = self._sizes.size(dense), time.perf_counter() - start
        self.dense = Score("ok", qualities[0], size, seconds, "", 0, *_controls(qualities)[0], self._time(dense))
        self._controls = [(0.0, 0.0)] * len(workloads)
        if anchor is not None and len(workloads) > 1:
            measured = [self._with_room(shard, partial(self._measure, anchor, shard)) for shard in shards]
            self._controls = _controls(measured)

    def evaluate(self, schedules: Sequence[Schedule], rival: Score | None = None, repeat: int = 0) -> list[Score]:
        """One score per schedule, in order. An evaluation that raises is a failed score, never a number.

        Args:
            repeat: at least 0; from the number of workloads on they repeat.
            rival: a full score of this evaluator. A schedule that lands on the same workload stops as soon as it is
                clearly worse, see `search.evaluation.early_stopping.clearly_worse`; one that lands on another is
                measured in full.

        Raises:
            ValueError: a schedule that does not fit the model, or a rival that is no full score of this evaluator.
        """
        return [self._evaluate(schedule, rival, repeat) for schedule in schedules]

    def slopes(self, schedule: Schedule, toward: Schedule, repeat: int = 0) -> dict[str, float]:
        """See `Evaluator`. Costs about three evaluations: a backward pass, and the outputs of the other choices.

        NaN everywhere where the passes give no numbers; nothing where they raise, as for want of memory: an agent takes
        that for a pass that failed, and goes on.
        """
        shard = self._shard(schedule, repeat)
        try:
            return self._with_room(shard, partial(self._slopes, schedule, toward, shard))
        except (RuntimeError, MemoryError):
            return {}

    def _slopes(self, schedule: Schedule, toward: Schedule, shard: int) -> dict[str, float]:
        workload = self._referenced(shard)
        with self.states.watch():
            self._applier.apply_(schedule)
        others = {name: self._applier.module(name, choice) for name, choice in toward if choice != schedule[name]}
        with watch_slopes(self._model, others) as sums:
            workload.descend(self._model)
        return sums

    def score_as_is(self, schedule: Schedule) -> Score:
        """Score of the model as it stands: after `close`, with its sites replaced by the caller as `schedule` says."""
        start = time.perf_counter()
        quality = self._workloads[0].measure(self._model)
        return Score(quality.state, quality, self._sizes.size(schedule), time.perf_counter() - start)

    def close(self) -> None:
        """Give the model back dense, bit for bit, and the memory of hidden states."""
        self.states.forget()
        self._applier.restore_()

    def _evaluate(self, schedule: Schedule, rival: Score | None, repeat: int) -> Score:
        size = self._sizes.size(schedule)
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
        seconds = time.perf_counter() - start
        return Score(state, quality, size, seconds, reason, shard, *self._controls[shard], self._time(schedule))

    def _measure(self, schedule: Schedule, shard: int, should_stop: ShouldStop | None = None) -> Quality:
        workload = self._referenced(shard)
        with self._following(schedule) as run_forward:
            return workload.measure(self._model, run_forward, should_stop)

    def _refer(self, shard: int) -> Quality:
        with self._following(self._dense) as run_forward:
            return self._workloads[shard].reference(self._model, run_forward)

    def _referenced(self, shard: int) -> Workload:
        if not self._workloads[shard].has_reference:
            self._refer(shard)
        return self._workloads[shard]

    def _shard(self, schedule: Schedule, repeat: int) -> int:
        return (int(schedule.digest[:8], 16) + repeat) % len(self._workloads)

    def _with_room(self, shard: int, work: Callable[[], Value]) -> Value:
        """`work`, again with batches of half the size as often as it runs out of memory, down to single rows.

        Smaller batches need a new reference, which differs from the old one by rounding only.
        """
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                smaller = self._workloads[shard].halved() if is_out_of_memory(error) else None
                if smaller is None:
                    raise
            # Outside the handler, whose traceback holds on to tensors.
            self._workloads[shard] = smaller
            self.states.forget()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _time(self, schedule: Schedule) -> float:
        return self._times(schedule) if self._times else math.nan

    @contextmanager
    def _following(self, schedule: Schedule) -> Iterator[RunForward]:
        """The model follows `schedule`; gives the way to pass a batch through it."""
        if self._repair is not None and any(not choice.is_dense for _, choice in schedule):
            self._applier.restore_()
            taken = self._repair(schedule)
            try:
                yield run_directly
            finally:
                put_modules(self._model, taken)
            return
        with self.states.watch():
            self._applier.apply_(schedule)
            yield partial(self.states, prefix_keys(schedule, self._sites, self.states.blocks))


def _lost(rival: Quality, seen: Quality, checks: int) -> bool:
    return clearly_worse(seen, rival, checks)


def _controls(qualities: Sequence[Quality]) -> list[tuple[float, float]]:
    """Of one schedule on every workload: its mean minus its value there, for KL and for expected accuracy."""
    if any(quality.state != "ok" for quality in qualities):
        raise Refusal("the anchor schedule gives NaN or infinite logits; nothing can be compared through it")
    kl = [quality.kl for quality in qualities]
    correct = [quality.expected_accuracy for quality in qualities]
    return [(fmean(kl) - one, fmean(correct) - other) for one, other in zip(kl, correct, strict=True)]
