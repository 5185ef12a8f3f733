"""A resumed run continues as if it had not been interrupted, and refuses another search."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_data import fake_data
from finished_runs import exam, files, run, trials
from small_run import words

from search import cli
from search.evaluation import pool
from search.evaluation.evaluator import ModelEvaluator
from search.evaluation.workload import Workload
from search.model.loading import load_model
from search.runtime.console import Stage
from search.trials import setup

__all__ = ["fake_data"]


@pytest.mark.usefixtures("fake_data")
@pytest.mark.parametrize("agent, budget", [("reinforce", 18), ("gradient", 18)])
@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_trials_of_an_undisturbed_one(
    agent: str, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(tmp_path / "whole", agent=agent, budget=budget, repair_tokens=512)
    measure, calls = pool.measure, []

    def stop_at_the_fourth(*what: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(*what)

    monkeypatch.setattr(pool, "measure", stop_at_the_fourth)
    assert cli.main(words(out=tmp_path / "cut", agent=agent, budget=budget, repair_tokens=512)) == 130
    assert "--resume" in capsys.readouterr().err
    assert len(trials(tmp_path / "cut")) == 3
    monkeypatch.setattr(pool, "measure", measure)
    measured = _measured_schedules(monkeypatch, last="uniform-whitened")
    assert cli.main(["--resume", str(tmp_path / "cut")]) == 130
    counts = [(int(done), int(of)) for done, of in re.findall(r"(\d+)/(\d+) trials", capsys.readouterr().err)]
    assert all(done <= of for done, of in counts)
    assert cli.main(["--resume", str(tmp_path / "cut"), "--quiet"]) == cli.DONE
    assert len(measured) == len(set(measured)), "a resumed run measured a schedule again"
    assert trials(tmp_path / "cut") == trials(tmp_path / "whole")
    again = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert [row["kl"] for row in again["rows"]] == [row["kl"] for row in whole["rows"]]


def _measured_schedules(monkeypatch: pytest.MonkeyPatch, last: str) -> list[tuple[str, bool]]:
    """The digests of schedules that are measured from now on after a search, and whether with packed tensors.

    The process is interrupted once after it has said that the schedule `last` is measured.
    """
    found: list[tuple[str, bool]] = []
    evaluate, advance, interrupted = ModelEvaluator.evaluate, Stage.advance, []

    def noted(self: ModelEvaluator, schedules: Any, *how: Any, **named: Any) -> Any:
        if len(self._workloads) == 1:  # the search has several
            found.extend((schedule.digest, self._applier._packed) for schedule in schedules)
        return evaluate(self, schedules, *how, **named)

    def interrupting(self: Stage, count: int = 1, detail: str = "") -> None:
        advance(self, count, detail)
        if detail.startswith(f"{last}:") and not interrupted:
            interrupted.append(detail)
            raise KeyboardInterrupt

    monkeypatch.setattr(ModelEvaluator, "evaluate", noted)
    monkeypatch.setattr(Stage, "advance", interrupting)
    return found


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_a_failed_trial_stays_failed_when_the_run_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, calls = Workload.measure, []

    def fail_the_second_trial(self: Workload, model: Any, *how: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("device lost")
        return measure(self, model, *how)

    monkeypatch.setattr(Workload, "measure", fail_the_second_trial)
    assert cli.main(words(out=tmp_path / "run", agent="evolution", search_shards=1)) == cli.FAILURES
    before = trials(tmp_path / "run")
    assert [trial[2] is None for trial in before] == [False, True, False, False, False, False]
    monkeypatch.setattr(Workload, "measure", measure)
    assert cli.main(["--resume", str(tmp_path / "run"), "--quiet"]) == cli.FAILURES
    assert trials(tmp_path / "run") == before


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_a_run_keeps_its_number_type_on_a_machine_that_would_take_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = run(tmp_path / "run", agent="random", budget=2)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert cli.main(["--resume", str(tmp_path / "run"), "--budget", "3"]) == cli.DONE
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rows"][0]["bytes"] == begun["rows"][0]["bytes"]
    capsys.readouterr()
    assert cli.main(["--resume", str(tmp_path / "run"), "--dtype", "bfloat16"]) == cli.REFUSED
    assert "dtype" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("fake_data")
def test_resuming_under_another_reward_or_data_is_refused_with_a_diff(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "run", budget=2)
    assert cli.main(["--resume", str(tmp_path / "run"), "--kl-weight", "2", "--quiet"]) == cli.REFUSED
    assert "kl_weight was 1.0, is 2.0" in capsys.readouterr().err
    reward = setup.Reward
    monkeypatch.setattr(setup, "Reward", lambda **given: reward(**{**given, "floor": -7.0}))
    assert cli.main(["--resume", str(tmp_path / "run"), "--quiet"]) == cli.REFUSED
    assert "reward.floor was -30.0, is -7.0" in capsys.readouterr().err


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_resuming_with_another_model_or_other_questions_is_refused_and_the_folder_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, loaded = tmp_path / "run", load_model("random:tiny-llama", "cpu")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    loaded.model.save_pretrained(tmp_path / "model")
    questions = exam(tmp_path / "exam.jsonl", "What")
    run(folder, agent="random", budget=2, model=tmp_path / "model", proxy=questions)
    before = files(folder)

    def refused() -> str:
        capsys.readouterr()
        assert cli.main(["resume", str(folder), "--budget", "3"]) == cli.REFUSED
        assert files(folder) == before
        return capsys.readouterr().err

    with monkeypatch.context() as patched:
        patched.setattr("search.pipeline.run.calibrate", lambda *_: pytest.fail("it went to work"))
        exam(tmp_path / "exam.jsonl", "Which")
        assert re.search("belongs to another search: search_items was [0-9a-f.]+, is [0-9a-f.]+", refused())
        exam(tmp_path / "exam.jsonl", "What")
        loaded.model.model.norm.weight.data[0] += 1
        loaded.model.save_pretrained(tmp_path / "model")
        assert re.search("belongs to another search: model was [0-9a-f.]+, is [0-9a-f.]+; ", refused())
    loaded.model.model.norm.weight.data[0] -= 1
    loaded.model.save_pretrained(tmp_path / "model")
    assert cli.main(["resume", str(folder), "--budget", "3", "--quiet"]) == cli.DONE
