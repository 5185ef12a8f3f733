"""Scores that a run keeps are those it measured, to the last bit, and only for what they were measured on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from compression.schedule import Choice, Schedule
from compression.size import Size
from search.evaluation.quality import CorpusQuality, Quality
from search.evaluation.score import Score
from search.trials.kept_scores import KeptScores, keeping

ONE, OTHER = (Schedule((("a", Choice("pivoted", chi, "two-sided")),)) for chi in (3, 4))
SIZE = Size(0.5, 0.75, 0.7, 120, 480, 240)


def score(kl: float, state: str = "ok") -> Score:
    quality = Quality(
        state="ok",
        kl=kl,
        perplexity=math.inf,
        tokens=7,
        kl_by_sequence=(kl, 1 / 3),
        tokens_by_sequence=(3, 4),
        by_corpus=(CorpusQuality("items", kl, 0.1, math.nan),),
    )
    return Score(state, quality, SIZE, 1.5)


class Counting:
    """Gives every schedule the number of the call as its KL."""

    def __init__(self, state: str = "ok") -> None:
        self.calls, self.state = 0, state

    def evaluate(self, schedules: Sequence[Schedule], rival: Score | None = None, repeat: int = 0) -> list[Score]:
        self.calls += 1
        return [score(self.calls / 7, self.state) for _ in schedules]


def test_a_kept_score_is_read_back_as_it_was(tmp_path: Path) -> None:
    KeptScores(tmp_path / "scores.json", pytest.fail).put("key", score(1 / 3))
    found = KeptScores(tmp_path / "scores.json", pytest.fail).get("key")
    assert repr(found) == repr(score(1 / 3))
    assert found is not None
    assert found.quality.kl_by_sequence == (1 / 3, 1 / 3)
    assert found.quality.tokens_by_sequence == (3, 4)


def test_a_later_process_measures_only_what_was_not_measured(tmp_path: Path) -> None:
    evaluator = Counting()
    [first] = keeping(KeptScores(tmp_path / "s.json", pytest.fail), evaluator, {"part": "x"}).evaluate([ONE])
    later = KeptScores(tmp_path / "s.json", pytest.fail)
    again, new = keeping(later, evaluator, {"part": "x"}).evaluate([ONE, OTHER])
    assert (repr(again), new.kl, evaluator.calls) == (repr(first), 2 / 7, 2)


@pytest.mark.parametrize("how", ["part", "rival", "repeat"])
def test_a_score_under_other_conditions_is_measured(how: str, tmp_path: Path) -> None:
    kept, evaluator = KeptScores(tmp_path / "s.json", pytest.fail), Counting()
    keeping(kept, evaluator, {"part": "x"}).evaluate([ONE], score(0.2))
    rival, repeat = score(0.3 if how == "rival" else 0.2), int(how == "repeat")
    keeping(kept, evaluator, {"part": "y" if how == "part" else "x"}).evaluate([ONE], rival, repeat)
    assert evaluator.calls == 2


def test_what_failed_is_tried_again(tmp_path: Path) -> None:
    kept, evaluator = KeptScores(tmp_path / "s.json", pytest.fail), Counting("failed")
    for _ in range(2):
        keeping(kept, evaluator, {}).evaluate([ONE])
    assert evaluator.calls == 2


@pytest.mark.parametrize("content", ["", "{", '{"key": {"state": "ok"}}', '{"key": 3}', "[]", "\0"])
def test_a_damaged_file_is_said_and_measured_again(content: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(content)
    notes: list[str] = []
    kept, evaluator = KeptScores(tmp_path / "s.json", notes.append), Counting()
    keeping(kept, evaluator, {}).evaluate([ONE])
    assert evaluator.calls == 1
    assert notes == [f"{tmp_path / 's.json'} is damaged; its schedules are measured again"]
    assert KeptScores(tmp_path / "s.json", pytest.fail)
