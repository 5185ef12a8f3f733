"""Hold the results of one model on one task, item by item, and compare two of them.

Holds plain values; does not know models or files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean, stdev
from typing import Any

from compression.refusal import Refusal
from compression.storage.strict_json import json_digest

__all__ = ["Outcome", "Paired", "mean_and_error", "paired"]

_INTERVAL = NormalDist().inv_cdf(0.975)  # half-width of a 95 % interval in standard errors


@dataclass(frozen=True)
class Outcome:
    """The results of a model on a task.

    Attributes:
        model: name of the model.
        model_digest: digest of its parameters, see `search.model.loading.model_digest`.
        task: name of the task.
        items_digest: digest of the rows in order, see `search.benchmarking.selection.Selection`.
        metric: name of the metric shown in the table.
        figures: one number per item for every metric of the task, by name; empty unless `state` is "ok".
        state: "ok", or "nonfinite" if the model gave a NaN or infinite logit.
        seconds: wall time.
        device: "cpu" or "cuda".
        architecture: digest of what the model computes with its parameters and how it reads text; empty in outcomes of
            earlier versions.
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
    architecture: str = ""

    @property
    def values(self) -> Sequence[float]:
        """The metric shown in the table, one number per item."""
        return self.figures.get(self.metric, ())

    def row(self) -> dict[str, object]:
        """One row of the CSV: means and standard errors of all metrics, or none of them in state "nonfinite"."""
        row: dict[str, object] = {"model": self.model, "task": self.task, "state": self.state, "n": len(self.values)}
        row |= {"metric": self.metric, "seconds": round(self.seconds, 2)}
        row["value"], row["stderr"] = mean_and_error(self.values)
        for name, values in self.figures.items():
            row[name], row[f"{name}_stderr"] = mean_and_error(values)
        return row

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with a checksum."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain | {"sha256": json_digest(plain)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Outcome:
        """Inverse of `to_dict`.

        Raises:
            TypeError: fields are missing or unknown.
            Refusal: the checksum differs; outcomes of earlier versions have none, and nothing is checked there.
        """
        plain = {name: value for name, value in values.items() if name != "sha256"}
        if "sha256" in values and values["sha256"] != json_digest(plain):
            raise Refusal("the checksum of an outcome differs")
        return cls(**plain)


@dataclass(frozen=True)
class Paired:
    """The difference between two models on the same items.

    Attributes:
        value: mean of the first model's metric minus that of the second.
        standard_error: standard error of `value`, with items as the sampling unit; NaN for fewer than two items.
        low, high: ends of the 95 % confidence interval of the difference (normal approximation).
        items: number of items.
    """

    value: float
    standard_error: float
    low: float
    high: float
    items: int


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error s/√n, where s² divides by n − 1 as in lm-eval; NaN if there are too few numbers."""
    if not values:
        return math.nan, math.nan
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def paired(one: Outcome, other: Outcome) -> Paired:
    """The paired difference `one` minus `other` over items.

    Raises:
        ValueError: the outcomes were measured on different items, or one has no numbers.
    """
    if (one.task, one.items_digest) != (other.task, other.items_digest) or len(one.values) != len(other.values):
        raise Refusal(f"{one.model} and {other.model} were not measured on the same items of {one.task}")
    if not one.values:
        raise Refusal(f"{one.model} or {other.model} has no numbers on {one.task}")
    value, error = mean_and_error([mine - theirs for mine, theirs in zip(one.values, other.values, strict=True)])
    return Paired(value, error, value - _INTERVAL * error, value + _INTERVAL * error, len(one.values))
