"""Outcomes: what one model got on one task, item by item, and how two of them are compared.

Plain values; knows no model and no file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean, stdev
from typing import Any

from compression.refusal import Refusal

__all__ = ["Outcome", "Paired", "mean_and_error", "paired"]

_INTERVAL = NormalDist().inv_cdf(0.975)  # standard errors on either side of the mean that hold it in 95 % of cases


@dataclass(frozen=True)
class Outcome:
    """What a model got on a task.

    Attributes:
        model: its name.
        model_digest: of what it holds, see `search.model.loading.model_digest`.
        task: the task's name.
        items_digest: of the rows in order, see `search.benchmarking.selection.Selection`.
        metric: the figure of the table.
        figures: every figure of the task, by name one number per item; empty unless `state` is "ok".
        state: "ok", or "nonfinite" where the model gave a logit that is no finite number.
        seconds: wall time.
        device: "cpu" or "cuda".
    """

    model: str
    model_digest: str
    task: str
    items_digest: str
    metric: str
    figures: Mapping[str, Sequence[float]]
    state: str
    seconds: float
    device: str

    @property
    def values(self) -> Sequence[float]:
        """The figure of the table, one number per item."""
        return self.figures.get(self.metric, ())

    def row(self) -> dict[str, object]:
        """One line of the CSV: means and standard errors of all figures; figures of a "nonfinite" one are left out."""
        row: dict[str, object] = {"model": self.model, "task": self.task, "state": self.state, "n": len(self.values)}
        row |= {"metric": self.metric, "seconds": round(self.seconds, 2)}
        row["value"], row["stderr"] = mean_and_error(self.values)
        for name, values in self.figures.items():
            row[name], row[f"{name}_stderr"] = mean_and_error(values)
        return row

    def to_dict(self) -> dict[str, Any]:
        """JSON's form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Outcome:
        """Inverse of `to_dict`. Raises TypeError on anything else."""
        return cls(**values)


@dataclass(frozen=True)
class Paired:
    """A difference of two models on the same items.

    Attributes:
        value: mean of one model's figure minus the other's.
        standard_error: of it, items as the sampling unit; NaN for fewer than two.
        low, high: ends of the interval that holds the true difference in 95 % of cases (normal approximation).
        items: how many.
    """

    value: float
    standard_error: float
    low: float
    high: float
    items: int


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error s/√n, s² with n − 1 as in lm-eval; NaN where there are too few numbers."""
    if not values:
        return math.nan, math.nan
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def paired(one: Outcome, other: Outcome) -> Paired:
    """`one` minus `other`, item by item.

    Raises:
        ValueError: they are not of the same items, or one has no numbers.
    """
    if (one.task, one.items_digest) != (other.task, other.items_digest) or len(one.values) != len(other.values):
        raise Refusal(f"{one.model} and {other.model} were not measured on the same items of {one.task}")
    if not one.values:
        raise Refusal(f"{one.model} or {other.model} has no numbers on {one.task}")
    value, error = mean_and_error([mine - theirs for mine, theirs in zip(one.values, other.values, strict=True)])
    return Paired(value, error, value - _INTERVAL * error, value + _INTERVAL * error, len(one.values))
