import json

import pytest

from envs import Problem, ScoreTable, ToyEvaluator, ToyScore, toy_menu


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


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": ["x", 1, 1]}', '{"a": [1, 2, 3, 4, 5]}'])
def test_a_file_that_is_no_table_is_refused(content, tmp_path):
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(ValueError, match="is no table of scores"):
        ScoreTable(lambda schedules: [], tmp_path / "scores.json")
