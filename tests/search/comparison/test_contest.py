"""A contest on a tiny model: complete, repeatable, continued after a stop or with more agents, and strict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_data import fake_data

from search import cli
from search.comparison.contest import CURVE, TABLE
from search.evaluation.evaluator import ModelEvaluator
from search.reporting.opened_run import CONTEST

__all__ = ["fake_data"]

SMALL = {
    "model": "random:tiny-llama",
    "device": "cpu",
    "budget": 8,
    "target_kept": 0.7,
    "calibration_tokens": 1500,
    "search_items": 2,
    "search_shards": 2,
    "search_text_tokens": 128,
    "heldout_tokens": 600,
    "report_items": 6,
}

pytestmark = pytest.mark.usefixtures("fake_data")


def words(**changes: object) -> list[str]:
    flags = {f"--{name.replace('_', '-')}": str(value) for name, value in {**SMALL, **changes}.items()}
    return ["compare", *(word for pair in flags.items() for word in pair), "--quiet"]


def contest(folder: Path) -> dict[str, Any]:
    document = json.loads((folder / CONTEST).read_text())
    assert isinstance(document, dict)
    for entry in document["entries"]:
        del entry["agent_seconds"], entry["evaluation_seconds"]
    return document


def compared(folder: Path, **changes: object) -> dict[str, Any]:
    given = {"agents": "reinforce,random,lagrangian", "seeds": "0,1", **changes}
    assert cli.main(words(out=folder, **given)) == cli.DONE
    return contest(folder)


@pytest.mark.slow
def test_every_agent_and_seed_ends_in_the_table_with_equal_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = compared(tmp_path / "run")
    assert [(entry["agent"], entry["seed"]) for entry in document["entries"]] == [
        (name, seed) for name in ("lagrangian", "random", "reinforce") for seed in (0, 1)
    ]
    for entry in document["entries"][2:]:
        first = 4 if entry["agent"] == "reinforce" else 2  # its first look is one with slopes
        assert [mark["evaluations"] for mark in entry["marks"]] == [first, 4, 8]
        tokens = [mark["tokens"] for mark in entry["marks"]]
        assert tokens == sorted(tokens)
        assert tokens[0] > 0
        assert {entry["selected"], *(mark["digest"] for mark in entry["marks"])} <= document["heldout"].keys()
    assert document["schedules"] == []
    table = (tmp_path / "run" / TABLE).read_text()
    assert all(f"| {name} | 2 | 8 |" in table for name in ("reinforce", "random"))
    assert table in capsys.readouterr().out
    assert (tmp_path / "run" / CURVE).read_text().startswith("<?xml")


@pytest.mark.slow
def test_a_contest_that_was_stopped_ends_like_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = compared(tmp_path / "whole")
    evaluate, calls = ModelEvaluator.evaluate, []

    def stop_now_and_then(self: ModelEvaluator, *what: Any, **how: Any) -> Any:
        calls.append(1)
        if len(calls) in (5, 20, 40):
            raise KeyboardInterrupt
        return evaluate(self, *what, **how)

    monkeypatch.setattr(ModelEvaluator, "evaluate", stop_now_and_then)
    line = words(out=tmp_path / "cut", agents="reinforce,random,lagrangian", seeds="0,1")
    assert cli.main(line) == 130
    assert "python search.py compare --resume" in capsys.readouterr().err
    again = ["compare", "--resume", str(tmp_path / "cut"), "--agents", "reinforce,random,lagrangian", "--seeds", "0,1"]
    codes = [cli.main([*again, "--quiet"]) for _ in range(3)]
    assert codes == [130, 130, cli.DONE]
    assert contest(tmp_path / "cut") == whole


@pytest.mark.slow
def test_backward_passes_are_paid_for(tmp_path: Path) -> None:
    (entry,) = compared(tmp_path / "run", agents="gradient", seeds="0", budget=16)["entries"]
    assert [mark["evaluations"] for mark in entry["marks"]] == [4, 8, 16]
    first, _, last = (mark["tokens"] for mark in entry["marks"])
    (other,) = compared(tmp_path / "other", agents="random", seeds="0", budget=16)["entries"]
    assert last == pytest.approx(other["marks"][-1]["tokens"], rel=0.3)
    assert first < 0.4 * last


@pytest.mark.slow
def test_a_published_contest_takes_one_more_agent_without_searching_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared(tmp_path / "run", agents="reinforce", seeds="0")
    (tmp_path / "run" / "reinforce-0" / "study.db").unlink()
    again = ["compare", "--resume", str(tmp_path / "run"), "--seeds", "0", "--quiet"]
    monkeypatch.setattr(ModelEvaluator, "evaluate", None)
    assert cli.main([*again, "--agents", "reinforce"]) == cli.DONE
    monkeypatch.undo()


@pytest.mark.slow
def test_a_schedule_that_is_measured_already_may_be_chosen_again(tmp_path: Path) -> None:
    compared(tmp_path / "run", agents="random", seeds="0", budget=4)
    words_again = ["compare", "--resume", str(tmp_path / "run"), "--quiet"]
    assert cli.main([*words_again, "--agents", "lagrangian,reinforce", "--seeds", "0"]) == cli.DONE
    document = contest(tmp_path / "run")
    assert document["schedules"] == []
    assert document["closed_form"] in document["entries"][0]["finalists"]


@pytest.mark.parametrize(
    "changes, complaint",
    [
        (dict(agents="reinforce,renforce"), "the nearest is reinforce"),
        (dict(agents="random,random"), "agents must be one or more different values"),
        (dict(seeds="0,0"), "seeds must be one or more different values"),
        (dict(seeds="0,x"), "seeds must be comma-separated whole numbers"),
        (dict(seeds="-1"), "seed must be"),
        (dict(budget=2), "budget must be at least 4"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_work(
    changes: dict[str, str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"agents": "random", "seeds": "0", **changes}
    assert cli.main(words(out=tmp_path / "run", **given)) == cli.REFUSED
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_contest_is_refused_with_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compared(tmp_path / "run", agents="lagrangian", seeds="0")
    line = ["compare", "--resume", str(tmp_path / "run"), "--agents", "lagrangian", "--seeds", "0", "--quiet"]
    assert cli.main([*line, "--budget", "9"]) == cli.REFUSED
    assert "budget was 8, is 9" in capsys.readouterr().err


@pytest.mark.slow
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compared(tmp_path / "run", agents="lagrangian", seeds="0")
    line = ["compare", "--resume", str(tmp_path / "run"), "--agents", "lagrangian", "--seeds", "0", "--quiet"]
    for content in ("", "[1]", '{"format": 99}', '{"format": 1, "entries": [{}]}', "{" * 100_000):
        (tmp_path / "run" / CONTEST).write_text(content)
        capsys.readouterr()
        assert cli.main(line) == cli.REFUSED, content[:40]
        error = capsys.readouterr().err
        assert "cannot use" in error
        assert error.count("\n") == 1
