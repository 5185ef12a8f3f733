"""A run folder and a prior of an earlier commit are still read, reported and continued.

`fixtures/run-COMMIT` was written by that commit from the hand-made data of `fakedata`; its study is kept as SQL text.
"""

from __future__ import annotations

import csv
import json
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from fake_data import fake_data

from search import cli
from search.data.prompts import render
from search.experiment import experiment
from search.priors.format import Prior

__all__ = ["fake_data"]

RUNS = sorted((Path(__file__).parents[1] / "fixtures").glob("run-*"))


@pytest.fixture(params=RUNS, ids=lambda run: run.name)
def earlier(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(request.param, folder, ignore=shutil.ignore_patterns("*.sql"))
    with closing(sqlite3.connect(folder / "study.db")) as study:
        study.executescript((request.param / "study.sql").read_text(encoding="utf-8"))
    return folder


def trials(run: Path) -> list[dict[str, str]]:
    with open(run / "trials.csv", encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def test_there_are_earlier_runs() -> None:
    assert RUNS


def test_an_earlier_run_is_reported_and_its_prior_is_valid(earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(earlier)]) == cli.DONE
    assert "searched" in (earlier / "report.html").read_text(encoding="utf-8")
    assert cli.main(["prior", "validate", str(earlier / "prior.json")]) == cli.DONE
    assert "ok, 21 sites of random:tiny-llama" in capsys.readouterr().out


@pytest.mark.usefixtures("fake_data")
def test_an_earlier_run_whose_kl_counted_instructions_does_not_go_on_and_loses_nothing(
    earlier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in earlier.rglob("*") if path.is_file()}
    assert cli.main(["resume", str(earlier), "--budget", "100", "--quiet"]) == cli.REFUSED
    assert "kl_counts was instructions of items too, is no instructions of items\n" in capsys.readouterr().err
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_an_earlier_run_goes_on_with_every_trial_kept(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As if it had been measured as today: without instructions nothing of an item is uncounted.
    monkeypatch.setattr(experiment, "render", lambda *what: replace(render(*what), instruction=""))
    before, summary = trials(earlier), json.loads((earlier / "summary.json").read_text(encoding="utf-8"))
    was = Prior.read(earlier / "prior.json")
    more = ["--budget", str(len(before) + 2), "--heal-minutes", "0", "--benchmark-items", "0", "--export", "none"]
    assert cli.main(["resume", str(earlier), *more, "--quiet"]) == cli.DONE
    after = trials(earlier)
    assert len(after) == len(before) + 2
    for old, new in zip(before, after, strict=False):
        assert (new["digest"], new["reward"]) == (old["digest"], old["reward"])
    rows = {row["schedule"]: row for row in json.loads((earlier / "summary.json").read_text(encoding="utf-8"))["rows"]}
    for row in summary["rows"]:
        assert rows[row["schedule"]]["kl"] == pytest.approx(row["kl"], rel=1e-3, abs=1e-6)
    assert Prior.read(earlier / "prior.json").model == was.model
