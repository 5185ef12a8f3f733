"""How a run ends: with repair, healing, benchmarks and exports, or without."""

from __future__ import annotations

import csv
import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_data import fake_data
from finished_runs import run
from small_run import HEAL, HEALED, NAMES, words
from torch import nn

from compression import Schedule
from compression.refusal import Refusal
from search import cli
from search.evaluation.evaluator import ModelEvaluator
from search.experiment import experiment, open_model
from search.export.restore import restore
from search.healing import repaired_start
from search.healing.repaired_start import repair_did_harm
from search.pipeline import measure
from search.runtime.console import Console

__all__ = ["fake_data"]


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_the_model_is_dense_again_after_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    load = open_model.load_model

    def remember(*args: Any) -> Any:
        loaded = load(*args)
        state = {name: value.clone() for name, value in loaded.model.state_dict().items()}
        seen.append((loaded.model, state))
        return loaded

    monkeypatch.setattr(open_model, "load_model", remember)
    run(tmp_path / "run", budget=2, **HEAL)
    [(model, before)] = seen
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.slow
@pytest.mark.usefixtures("fake_data")
@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (Refusal("no text is left"), cli.DONE, "the result is not repaired and healed: no text is left"),
        (IndexError("mask"), 1, "this is a fault of Chisel, not of your input: IndexError: mask"),
    ],
)
def test_a_run_whose_healing_ends_badly_still_leaves_table_prior_and_report(
    error: Exception,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(measure, "heal_experiment_", fail)
    flags = [word for word in words(out=tmp_path / "run", budget=1, **HEAL) if word != "--quiet"]
    assert cli.main(flags) == code
    output = capsys.readouterr()
    assert said in output.err
    assert "searched" in output.out
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]
    assert [row["schedule"] for row in rows] == NAMES
    assert all((tmp_path / "run" / name).is_file() for name in ("prior.json", "report.html", "digest.json"))


@pytest.mark.slow
@pytest.mark.usefixtures("fake_data")
def test_budget_zero_measures_the_baselines_only_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([word for word in words(out=tmp_path / "run", budget=0) if word != "--quiet"]) == cli.DONE
    assert "budget 0: no search, only the baselines are measured" in capsys.readouterr().err
    document = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert document["trials"] == 0
    rows = {row["schedule"]: row for row in document["rows"]}
    assert rows["searched"]["kl"] == rows["lagrangian"]["kl"]


@pytest.mark.slow
@pytest.mark.usefixtures("fake_data")
def test_nonfinite_trials_are_recorded_as_such_and_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, calls = ModelEvaluator.evaluate, []

    def poison_the_second(self: ModelEvaluator, *what: Any, **how: Any) -> Any:
        calls.append(1)
        if len(calls) != 2:
            return evaluate(self, *what, **how)
        hook = self._model.get_output_embeddings().register_forward_hook(lambda m, a, output: output * torch.nan)
        try:
            return evaluate(self, *what, **how)
        finally:
            hook.remove()

    monkeypatch.setattr(ModelEvaluator, "evaluate", poison_the_second)
    run(tmp_path / "run", agent="evolution", budget=4)
    found = sqlite3.connect(tmp_path / "run" / "study.db").execute("select state, count(*) from trials group by state")
    assert dict(found.fetchall()) == {"COMPLETE": 3, "FAIL": 1}
    header, *lines = (tmp_path / "run" / "trials.csv").read_text().splitlines()
    second = dict(zip(header.split(","), lines[1].split(","), strict=True))
    assert (second["state"], second["reward"], second["accuracy"], second["kl"]) == ("nonfinite", "", "", "")


@pytest.mark.slow
@pytest.mark.usefixtures("fake_data")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_run_whose_repair_gives_no_numbers_is_not_healed_and_ends_with_its_table(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repair = experiment.Experiment.repair_

    def poisoned(self: experiment.Experiment, *what: Any, **how: Any) -> Any:
        taken = repair(self, *what, **how)
        next(self.loaded.model.get_submodule(next(iter(taken))).parameters()).fill_(value)
        return taken

    monkeypatch.setattr(experiment.Experiment, "repair_", poisoned)
    assert cli.main(words(out=tmp_path / "run", budget=0, agent="lagrangian", **HEAL)[:-1]) == cli.DONE
    assert "healing stopped: the model gives NaN or infinite logits" in capsys.readouterr().err
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]
    assert [row["schedule"] for row in rows] == HEALED
    assert [row["kl"] for row in rows[-2:]] == [None, None]


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_a_run_may_end_with_benchmarks_and_a_folder_that_others_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("search.pipeline.finish.TASKS", ("arc_easy", "boolq"))
    ends = dict(out=tmp_path / "run", budget=0, agent="lagrangian", benchmark_items=2, export="hf", **HEAL)
    loads: list[str] = []
    load = open_model.load_model
    monkeypatch.setattr(open_model, "load_model", lambda name, *how: loads.append(name) or load(name, *how))
    assert cli.main(words(**ends)) == cli.DONE
    out = capsys.readouterr().out
    assert out.index("uniform-plain") < out.index("boolq") < out.index("load it with")
    assert loads == ["random:tiny-llama"]  # one job loads the dense model once
    rows = list(csv.DictReader((tmp_path / "run" / "benchmarks.csv").read_text().splitlines()))
    assert {row["model"] for row in rows} == {"dense", "uniform", "lagrangian", "searched", "healed"}
    assert (tmp_path / "run" / "hf" / "config.json").is_file()
    assert "boolq" in (tmp_path / "run" / "report.html").read_text()
    card = tmp_path / "run" / "hf" / "README.md"
    assert "were trained for a while" in card.read_text()
    assert cli.main(["--resume", str(tmp_path / "run"), "--heal-minutes", "0", "--quiet"]) == cli.DONE
    assert "nothing was trained" in card.read_text()
    kept, exported = (tmp_path / "run" / place / "prior.json" for place in (".", "hf"))
    assert kept.read_text() == exported.read_text()


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_a_repair_that_does_harm_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repair_ = experiment.Experiment.repair_

    def harmful(self: experiment.Experiment, schedule: Schedule, *arguments: Any) -> Mapping[str, nn.Module]:
        taken = repair_(self, schedule, *arguments)
        for name, choice in schedule:
            if not choice.is_dense:
                next(self.loaded.model.get_submodule(name).parameters()).data.mul_(-1)
        return taken

    monkeypatch.setattr(experiment.Experiment, "repair_", harmful)
    monkeypatch.setattr(repaired_start, "repair_did_harm", repair_did_harm)
    run = tmp_path / "run"
    loud = [word for word in words(out=run, budget=0, agent="lagrangian", **HEAL) if word != "--quiet"]
    assert cli.main(loud) == cli.DONE
    assert "repair is discarded" in capsys.readouterr().err
    rows = {row["schedule"]: row for row in json.loads((run / "summary.json").read_text())["rows"]}
    assert list(rows) == [name for name in HEALED if name != "repaired"]
    assert cli.main(["--resume", str(run), "--heal-minutes", "0", "--quiet"]) == cli.DONE
    outcome = restore(run, Console(quiet=True), "cpu", reference=True)
    assert outcome.state == "searched"
    assert outcome.workload is not None
    assert outcome.workload.measure(outcome.experiment.loaded.model).kl == pytest.approx(
        rows["searched"]["kl"], rel=1e-3
    )


@pytest.mark.slow
@pytest.mark.usefixtures("fake_data")
def test_without_repair_it_is_healed_as_it_was_decomposed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli.main(words(out=run, budget=0, agent="lagrangian", heal_minutes=0.01)) == cli.DONE
    document = json.loads((run / "healed" / "healing.json").read_text())
    assert [row["schedule"] for row in document["rows"]] == ["dense", "searched", "healed"]
    names = [row["schedule"] for row in json.loads((run / "summary.json").read_text())["rows"]]
    assert names == [name for name in HEALED if name != "repaired"]
