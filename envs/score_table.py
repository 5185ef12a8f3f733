"""Keeps scores of schedules in a JSON file, so that no schedule is measured twice. Does not know models or rewards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compression.refusal import Refusal
from compression.schedule import Schedule
from compression.storage.strict_json import parse
from compression.storage.whole_files import replace_file
from envs.reward import ScoreLike

__all__ = ["ScoreTable", "TabledScore"]


@dataclass(frozen=True)
class TabledScore:
    """Holds the attributes of a score that a table stores; see `envs.reward.ScoreLike`."""

    kl: float
    expected_accuracy: float
    kept_fraction: float
    bytes_fraction: float
    time_fraction: float
    state: str = "ok"

    @classmethod
    def of(cls, score: ScoreLike) -> TabledScore:
        """Returns the attributes of any score that a reward reads."""
        return cls(
            score.kl,
            score.expected_accuracy,
            score.kept_fraction,
            score.bytes_fraction,
            score.time_fraction,
            score.state,
        )


class ScoreTable:
    """Wraps an evaluator: looks up scores in the table, and measures and adds the missing ones.

    Attributes:
        measured: number of schedules that the wrapped evaluator has measured.
    """

    def __init__(self, evaluate: Callable[[Sequence[Schedule]], Sequence[ScoreLike]], path: Path) -> None:
        """Read the table at `path` if the file exists.

        Args:
            evaluate: measures schedules and returns their scores in order.
            path: JSON file of scores. It is valid for one evaluator only, so name it after the model and its data.

        Raises:
            ValueError: the file is not a table of scores.
        """
        self.measured = 0
        self._evaluate = evaluate
        self._path = path
        self._scores: dict[str, TabledScore] = {}
        if not path.exists():
            return
        try:
            rows: Any = parse(path.read_text(encoding="utf-8"))
            self._scores = {digest: _read(row) for digest, row in rows.items()}
        except (ValueError, TypeError, AttributeError):
            raise Refusal(f"{path} is not a table of scores; remove it or give another file") from None

    def __len__(self) -> int:
        return len(self._scores)

    def __call__(self, schedules: Sequence[Schedule]) -> list[TabledScore]:
        """Returns scores in the order of `schedules`; measures each new schedule once, all in one batch."""
        new = {schedule.digest: schedule for schedule in schedules if schedule.digest not in self._scores}
        if new:
            self.measured += len(new)
            scores = self._evaluate(list(new.values()))
            for digest, score in zip(new, scores, strict=True):
                self._scores[digest] = TabledScore.of(score)
        return [self._scores[schedule.digest] for schedule in schedules]

    def save(self) -> None:
        """Write all scores except failed ones: schedule digest -> numbers by name, null where not finite.

        After a crash at any point the file has either its old or its new content.
        """
        rows = {digest: _row(score) for digest, score in self._scores.items() if score.state == "ok"}
        replace_file(self._path, json.dumps(rows, indent=1, allow_nan=False) + "\n")


def _row(score: TabledScore) -> dict[str, float | None]:
    figures = {name: value for name, value in asdict(score).items() if name != "state"}
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _read(row: dict[str, Any]) -> TabledScore:
    figures: dict[str, Any] = {name: math.nan if value is None else float(value) for name, value in row.items()}
    return TabledScore(**figures)
