import json
import math
from dataclasses import dataclass

import pytest

from envs import Problem, Reward, ScoreTable, ToyEvaluator, ToyScore, toy_menu


@pytest.fixture
def problem():
    return Problem.build(toy_menu(), 0.5)


def test_nothing_is_measured_twice_not_even_in_another_run(problem, tmp_path):
    calls, truth = [], ToyEvaluator(problem.menu)

    def evaluate(schedules):
        calls.append(len(schedules))
        return truth(schedules)

    first, second = problem.closed_form(), problem.uniform()
    table = ScoreTable(evaluate, tmp_path / "scores.json")
    scores = table([first, second, first])
    assert [score.kl for score in scores] == [score.kl for score in truth([first, second, first])]
    table([second])
    table.save()
    again = ScoreTable(evaluate, tmp_path / "scores.json")
    assert again([first, second]) == scores[:2]
    assert (calls, table.measured, again.measured, len(again)) == ([2], 2, 0, 2)


def test_a_failure_is_measured_again_in_another_run(problem, tmp_path):
    table = ScoreTable(lambda schedules: [ToyScore(float("nan"), 0.0, 0.5, "failed")], tmp_path / "scores.json")
    assert table([problem.closed_form()])[0].state == "failed"
    table.save()
    assert json.loads((tmp_path / "scores.json").read_text()) == {}


def test_a_figure_that_nobody_asked_for_stays_unknown(problem, tmp_path):
    @dataclass(frozen=True)
    class Untimed(ToyScore):
        time_fraction: float = float("nan")

    table = ScoreTable(lambda schedules: [Untimed(0.1, 0.2, 0.5)], tmp_path / "scores.json")
    table([problem.closed_form()])
    table.save()
    [score] = ScoreTable(lambda schedules: [], tmp_path / "scores.json")([problem.closed_form()])
    assert (score.kl, score.bytes_fraction) == (0.1, 0.5)
    assert math.isnan(score.time_fraction)


def test_a_reward_reads_every_figure_it_may_weigh(problem, tmp_path):
    table = ScoreTable(ToyEvaluator(problem.menu), tmp_path / "scores.json")
    schedules = [problem.closed_form(), problem.uniform()]
    reward = Reward(bytes_weight=0.5, latency_weight=0.25)
    assert [*map(reward, table(schedules))] == [*map(reward, ToyEvaluator(problem.menu)(schedules))]


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": {"kl": "x"}}', '{"a": {"kl": 1}}', '{"a": [1, 2]}'])
def test_a_file_that_is_no_table_is_refused(content, tmp_path):
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(ValueError, match="is not a table of scores"):
        ScoreTable(lambda schedules: [], tmp_path / "scores.json")
