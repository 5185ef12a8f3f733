"""The public Python face: its functions do what the commands do, and a run's tables come out as data frames."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from fake_data import fake_data

from compression import Refusal
from search import api

__all__ = ["fake_data"]

SMALL = {
    "model": "random:tiny-llama",
    "device": "cpu",
    "target_kept": 0.7,
    "calibration_tokens": 1500,
    "repair_tokens": 300,
    "heal_minutes": 0.0,
    "search_items": 2,
    "search_text_tokens": 128,
    "heldout_tokens": 600,
    "report_items": 6,
    "benchmark_items": 0,
    "export": "none",
}


@pytest.mark.slow
@pytest.mark.usefixtures("fake_data")
def test_a_job_runs_and_its_tables_are_data_frames(tmp_path: Path) -> None:
    run = api.run(quiet=True, agent="random", budget=4, out=str(tmp_path / "run"), **SMALL)
    table = run.table()
    assert list(table["schedule"])[-2:] == ["searched", "repaired"]
    assert table.equals(pd.DataFrame(json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]))
    trials = run.trials()
    assert list(trials["trial"]) == [0, 1, 2, 3]
    assert trials["reward"].dtype == float
    schedule = run.schedule()
    assert len(schedule) == len(run.prior["sites"])
    kept = schedule["parameters"].sum() / schedule["shape"].map(lambda shape: shape[0] * shape[1]).sum()
    assert kept == pytest.approx(run.prior["kept_fraction"])
    assert run.config["agent"] == "random"

    restored = api.restore(tmp_path / "run", device="cpu", quiet=True)
    assert restored.state == "repaired"
    folder = api.export(tmp_path / "run", tmp_path / "small", api.ExportForm(dtype="float32"), quiet=True)
    assert (folder / "config.json").is_file()
    healed = api.heal(tmp_path / "run", api.HealingOptions(minutes=0.01), quiet=True)
    assert [row["schedule"] for row in healed.rows] == ["dense", "repaired", "healed"]
    assert run.healing(healed.folder.name)["kl"].iloc[0] > 0


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_a_sweep_and_a_comparison_are_data_frames_too(tmp_path: Path) -> None:
    sweep = api.profile([2], [], tokens=64, quiet=True, out=str(tmp_path / "sweep"), **SMALL)
    costs = sweep.sensitivity()
    assert set(costs["chi"]) == {2}
    assert costs.equals(pd.read_csv(tmp_path / "sweep" / "sensitivity.csv"))
    both = api.compare(["random", "lagrangian"], [0], quiet=True, budget=4, out=str(tmp_path / "both"), **SMALL)
    standings = both.standings()
    assert set(standings["agent"]) == {"random", "lagrangian"}
    assert standings["kl"].notna().all()
    assert standings["closed_form_kl"].nunique() == 1


@pytest.mark.usefixtures("fake_data")
def test_what_is_refused_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="target_kept must be"):
        api.run(quiet=True, target_kept=2.0)
    with pytest.raises(Refusal, match="is not a field of the configuration; the nearest is budget"):
        api.run(quiet=True, budgt=3)
    with pytest.raises(Refusal, match=r"has a config\.json"):
        api.open_run(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    opened = api.open_run(tmp_path)
    for read, words in (
        (opened.trials, "search of"),
        (opened.sensitivity, "profile"),
        (opened.benchmarks, "benchmark"),
    ):
        with pytest.raises(Refusal, match=words):
            read()
    (tmp_path / "trials.csv").write_text('a,b\n1,2,3\n"')
    with pytest.raises(Refusal, match=r"cannot use .*trials\.csv"):
        opened.trials()
