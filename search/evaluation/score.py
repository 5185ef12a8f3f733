"""What one evaluation of a schedule measured. Plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from compression.size import Size
from search.evaluation.quality import Quality

__all__ = ["Score"]


@dataclass(frozen=True)
class Score:
    """Everything measured about one schedule.

    Attributes:
        state: "ok"; "nonfinite" when a logit was NaN or infinite; "failed" when the evaluation raised; "raced" when it
            was given up for being clearly worse than a rival.
        quality: figures of the workload; those of its first sequences in state "raced", which stand for no more than
            that, and without numbers in other states but "ok".
        size: parameters, bytes, multiply-adds.
        seconds: wall time of this evaluation.
        reason: why it failed, else empty.
        shard: which of the evaluator's workloads it was measured on.
        kl_control, expected_accuracy_control: control variates, see `ModelEvaluator`; 0 with one workload.
        time_fraction: time of the sites after / before, see `search.evaluation.latency.SiteTimes`; NaN where it was
        not asked for.
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
        """KL(dense ‖ model), nats per token, estimated for all workloads together."""
        return self.quality.kl + self.kl_control

    @property
    def expected_accuracy(self) -> float:
        """Mean P(correct) over the items, estimated for all workloads together."""
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
        """One flat row of single figures; NaN becomes None. `kl` and `expected_accuracy` are those of the workload."""
        own = {name: getattr(self, name) for name in _OWN}
        row = own | {name: value for name, value in self.quality.scalars().items() if name != "state"}
        row |= asdict(self.size)
        return _plain(row)

    def to_row(self, schedule: str) -> dict[str, object]:
        """The same as a row of a final table, see `Quality.to_row`."""
        own = {name: getattr(self, name) for name in _OWN}
        return {"schedule": schedule, **_plain(self.quality.to_row() | own | asdict(self.size))}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Score:
        """Inverse of `to_dict`; per-sequence figures are not kept."""

        def pick(kind: type[Quality] | type[Size]) -> dict[str, Any]:
            known = {field.name for field in fields(kind)} & row.keys()
            return {name: math.nan if row[name] is None else row[name] for name in known}

        quality = Quality(**{**pick(Quality), "state": "ok" if row["state"] == "ok" else "nonfinite"})
        own = {name: row[name] for name in _OWN if row.get(name) is not None}
        return cls(quality=quality, size=Size(**pick(Size)), **own)


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """The same with None for numbers that are not finite."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


_OWN = ("state", "seconds", "reason", "shard", "kl_control", "expected_accuracy_control", "time_fraction")
