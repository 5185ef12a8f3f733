"""Hold the result of one evaluation of a schedule. Plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from compression.refusal import Refusal
from compression.size import Size
from search.evaluation.quality import Quality

__all__ = ["Score"]


@dataclass(frozen=True)
class Score:
    """Everything measured about one schedule.

    Attributes:
        state: "ok"; "nonfinite" if a logit was NaN or infinite; "failed" if the evaluation raised; "raced" if it was
            stopped early because the schedule is clearly worse than a rival.
        quality: quality on the workload. In state "raced" it covers only the first sequences and must not be compared
            with full measurements; in the states "nonfinite" and "failed" it has no numbers.
        size: parameters, bytes, multiply-adds.
        seconds: wall time of this evaluation.
        reason: why it failed, otherwise empty.
        shard: index of the evaluator's workload that it was measured on.
        kl_control, expected_accuracy_control: control variates, see `ModelEvaluator`; 0 with one workload.
        time_fraction: time of the sites after / before, see `search.evaluation.site_times.SiteTimes`; NaN unless time
            counts in the reward.
    """

    state: str
    quality: Quality
    size: Size
    seconds: float
    reason: str = ""
    shard: int = 0
    kl_control: float = 0.0
    expected_accuracy_control: float = 0.0
    time_fraction: float = math.nan

    @property
    def kl(self) -> float:
        """KL(dense ‖ model), nats per token, as an estimate over all workloads."""
        return self.quality.kl + self.kl_control

    @property
    def expected_accuracy(self) -> float:
        """Mean P(correct) over the items, as an estimate over all workloads."""
        return self.quality.expected_accuracy + self.expected_accuracy_control

    @property
    def kept_fraction(self) -> float:
        """Parameters after / before over the sites."""
        return self.size.kept_fraction

    @property
    def bytes_fraction(self) -> float:
        """Bytes after / before over the whole model."""
        return self.size.bytes_fraction

    def to_dict(self) -> dict[str, Any]:
        """One flat row of scalars; non-finite numbers become None.

        `kl` and `expected_accuracy` are the values on the workload used, without the control variates.
        """
        own = {name: getattr(self, name) for name in _OWN}
        row = own | {name: value for name, value in self.quality.scalars().items() if name != "state"}
        row |= asdict(self.size)
        return _plain(row)

    def to_row(self, schedule: str) -> dict[str, object]:
        """The same values as a row of a final table, see `Quality.to_row`."""
        own = {name: getattr(self, name) for name in _OWN}
        return {"schedule": schedule, **_plain(self.quality.to_row() | own | asdict(self.size))}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Score:
        """Inverse of `to_dict`, except for the per-sequence values, which `to_dict` drops.

        Raises:
            Refusal: a field is missing, or a figure is not a number.
        """
        if wrong := sorted(
            name for name in row if name not in _WORDS and not isinstance(row[name], int | float | None)
        ):
            raise Refusal(f"the figure {wrong[0]} of a score must be a number, got {row[wrong[0]]!r:.80}")

        def pick(kind: type[Quality] | type[Size]) -> dict[str, Any]:
            known = {field.name for field in fields(kind)} & row.keys()
            return {name: math.nan if row[name] is None else row[name] for name in known}

        try:
            quality = Quality(**{**pick(Quality), "state": "ok" if row["state"] == "ok" else "nonfinite"})
            own = {name: row[name] for name in _OWN if row.get(name) is not None}
            return cls(quality=quality, size=Size(**pick(Size)), **own)
        except (KeyError, TypeError) as error:
            raise Refusal(f"a score lacks a field: {error}") from None


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Replace non-finite numbers by None."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


_WORDS = ("state", "reason")
_OWN = ("state", "seconds", "reason", "shard", "kl_control", "expected_accuracy_control", "time_fraction")
