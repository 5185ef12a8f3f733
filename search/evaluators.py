"""Evaluators: schedules in, scores out, batch first. The only door to the model.

Budget, replay of known scores and the journal stand around an evaluator in `search.stages.run_agent`, the same for
every agent.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import torch
from torch import nn

from compression.apply import ScheduleApplier
from compression.factors import FactorStore
from compression.schedule import Schedule
from compression.size import Size, SizeModel
from search.scoring import Quality, Workload

__all__ = ["Evaluator", "ModelEvaluator", "Score"]


@dataclass(frozen=True)
class Score:
    """Everything measured about one schedule.

    Attributes:
        state: "ok"; "nonfinite" when a logit was NaN or infinite; "failed" when the evaluation raised.
        quality: figures of the workload; without numbers unless the state is "ok".
        size: parameters, bytes, multiply-adds.
        seconds: wall time of this evaluation.
        reason: why it failed, else empty.
    """

    state: str
    quality: Quality
    size: Size
    seconds: float
    reason: str = ""

    @property
    def kl(self) -> float:
        """KL(dense ‖ model), nats per token."""
        return self.quality.kl

    @property
    def expected_accuracy(self) -> float:
        """Mean P(correct) over the items."""
        return self.quality.expected_accuracy

    @property
    def kept_fraction(self) -> float:
        """Parameters after / before over the sites."""
        return self.size.kept_fraction

    def to_dict(self) -> dict[str, Any]:
        """One flat row of single figures; NaN becomes None."""
        row = {"state": self.state, "seconds": self.seconds, "reason": self.reason}
        row |= {name: value for name, value in self.quality.scalars().items() if name != "state"} | asdict(self.size)
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Score:
        """Inverse of `to_dict`; per-sequence figures are not kept."""

        def pick(kind: type[Quality] | type[Size]) -> dict[str, Any]:
            known = {field.name for field in fields(kind)} & row.keys()
            return {name: math.nan if row[name] is None else row[name] for name in known}

        quality = Quality(**{**pick(Quality), "state": "ok" if row["state"] == "ok" else "nonfinite"})
        return cls(row["state"], quality, Size(**pick(Size)), row["seconds"], row.get("reason") or "")


class Evaluator(Protocol):
    """Anything that scores schedules."""

    def evaluate(self, schedules: Sequence[Schedule]) -> list[Score]:
        """One score per schedule, in order."""


class ModelEvaluator:
    """Scores schedules on one live model and one workload.

    Args:
        model: the dense model; it follows one schedule after the other and is dense again after `close`.
        store: its factors.
        workload: what is measured; referenced to the dense model here.

    Attributes:
        dense: score of the untouched model.
    """

    def __init__(self, model: nn.Module, store: FactorStore, workload: Workload) -> None:
        self._model = model
        self._workload = workload
        self._applier = ScheduleApplier(model, store)
        self._sizes = SizeModel(model, store.sites)
        start = time.perf_counter()
        quality = workload.reference(model)
        dense = Schedule.dense(tuple(site.name for site in store.sites))
        self.dense = Score("ok", quality, self._sizes.size(dense), time.perf_counter() - start)

    def evaluate(self, schedules: Sequence[Schedule]) -> list[Score]:
        """One score per schedule, in order. An evaluation that raises is a failed score, never a number.

        Raises:
            ValueError: a schedule that does not fit the model.
        """
        return [self._evaluate(schedule) for schedule in schedules]

    def close(self) -> None:
        """Give the model back dense, bit for bit."""
        self._applier.restore_()

    def _evaluate(self, schedule: Schedule) -> Score:
        size = self._sizes.size(schedule)
        start = time.perf_counter()
        self._applier.apply_(schedule)
        try:
            quality = self._workload.measure(self._model)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            return Score("failed", Quality(), size, time.perf_counter() - start, reason)
        return Score(quality.state, quality, size, time.perf_counter() - start)
