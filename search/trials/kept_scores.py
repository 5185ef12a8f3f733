"""Keeps the scores of the stages after a search in the run folder, so that a resumed run does not measure them again.

Knows scores and schedules; does not know what they are measured on, of which the caller gives a description.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from compression.refusal import Refusal
from compression.schedule import Schedule
from compression.storage.strict_json import bounded_text, json_digest
from search.evaluation.evaluator import Scoring
from search.evaluation.score import Score
from search.runtime.files import write_whole

__all__ = ["KeptScores", "keeping"]

_SCORES = TypeAdapter(dict[str, Score], config=ConfigDict(ser_json_inf_nan="strings"))
_KEPT = ("ok", "nonfinite", "raced")  # what failed may succeed the next time


class KeptScores:
    """The scores in one JSON file, which is complete at any time.

    Args:
        path: the file; it need not exist.
        note: receives one line if the file is damaged. Its scores are then measured again.
    """

    def __init__(self, path: Path, note: Callable[[str], None]) -> None:
        self._path = path
        self._scores: dict[str, Score] = {}
        if not path.exists():
            return
        try:
            self._scores = _SCORES.validate_json(bounded_text(path, "the scores"))
        except (Refusal, ValidationError):
            note(f"{path} is damaged; its schedules are measured again")

    def get(self, key: str) -> Score | None:
        """The score of a key; None if it has none."""
        return self._scores.get(key)

    def put(self, key: str, score: Score) -> None:
        """Keep a score. Raises OSError if the disk is full or not writable."""
        self._scores[key] = score
        write_whole(self._path, _SCORES.dump_json(self._scores).decode())


def keeping(kept: KeptScores, evaluator: Scoring, measured_on: Mapping[str, object]) -> Scoring:
    """An evaluator that takes from `kept` what it has, and keeps there what `evaluator` measures.

    Args:
        measured_on: all that determines the score of a schedule, as values of JSON.
    """
    return _Keeping(kept, evaluator, measured_on)


class _Keeping:
    def __init__(self, kept: KeptScores, evaluator: Scoring, measured_on: Mapping[str, object]) -> None:
        self._kept, self._evaluator, self._on = kept, evaluator, dict(measured_on)

    def evaluate(self, schedules: Sequence[Schedule], rival: Score | None = None, repeat: int = 0) -> list[Score]:
        return [self._one(schedule, rival, repeat) for schedule in schedules]

    def _one(self, schedule: Schedule, rival: Score | None, repeat: int) -> Score:
        against = None if rival is None else rival.quality.kl_by_sequence
        key = json_digest({"on": self._on, "schedule": schedule.digest, "rival": against, "repeat": repeat})
        if (known := self._kept.get(key)) is not None:
            return known
        [score] = self._evaluator.evaluate([schedule], rival, repeat)
        if score.state in _KEPT:
            self._kept.put(key, score)
        return score
