"""Applying a prior and starting from one, on tiny models: exact where it was made, transferred elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fake_data import fake_data

from compression import MPOLinear, Schedule
from search import cli
from search.config import Config
from search.experiment.experiment import Experiment
from search.experiment.open_model import open_model
from search.pipeline.apply import compress_
from search.priors.format import Prior

__all__ = ["fake_data"]

SMALL = {
    "device": "cpu",
    "calibration_tokens": 1500,
    "search_items": 2,
    "search_text_tokens": 128,
    "search_shards": 2,
    "heldout_tokens": 600,
    "report_items": 6,
}
SEARCH = {"model": "random:tiny-llama", "target_kept": 0.7, "agent": "random", "budget": 3, "repair_tokens": 0}
SEARCH |= {"heal_minutes": 0, "benchmark_items": 0, "export": "none"}

pytestmark = pytest.mark.usefixtures("fake_data")


def flags(**values: object) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def searched(folder: Path, **changes: object) -> Path:
    assert cli.main([*flags(**SMALL, **{**SEARCH, **changes}, out=folder), "--quiet"]) == cli.DONE
    return folder / "prior.json"


def applied(prior: Path, folder: Path, *more: str, **changes: object) -> int:
    given = flags(**SMALL, **{"model": "random:tiny-llama", **changes}, prior=prior, out=folder)
    return cli.main(["apply", *given, *more, "--quiet"])


@pytest.mark.slow
def test_a_prior_is_exact_on_its_own_model_and_projected_onto_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prior = searched(tmp_path / "run")
    made = Prior.read(prior)
    assert applied(prior, tmp_path / "same") == cli.DONE
    assert "its schedule is used unchanged" in capsys.readouterr().out
    again = Prior.read(tmp_path / "same" / "prior.json")
    assert again.schedule == made.schedule
    assert Schedule.from_json((tmp_path / "same" / "schedule.json").read_text()) == made.schedule
    assert again.origin is not None
    assert again.origin.schedule_digest == made.schedule_digest
    kl = {score.schedule: score.kl for score in made.scores}["searched"]
    assert {score.schedule: score.kl for score in again.scores}["prior"] == kl  # the same held-out data
    assert [score.schedule for score in again.scores] == ["dense", "uniform", "lagrangian", "prior"]

    assert applied(prior, tmp_path / "quick", "--no-measure") == cli.DONE
    assert (tmp_path / "quick" / "prior.json").read_text() == made.to_json()

    capsys.readouterr()
    assert applied(prior, tmp_path / "smaller", "--no-measure", target_kept=0.5) == cli.DONE
    smaller = Prior.read(tmp_path / "smaller" / "prior.json")
    assert 0.45 < smaller.kept_fraction <= 0.5
    assert "scaled from kept fraction" in capsys.readouterr().out

    # Another architecture that has the same kinds of matrices.
    assert applied(prior, tmp_path / "qwen", "--no-measure", model="random:tiny-qwen2") == cli.DONE
    assert Prior.read(tmp_path / "qwen" / "prior.json").kept_fraction <= 0.7
    capsys.readouterr()
    assert applied(prior, tmp_path / "gpt2", "--no-measure", model="random:tiny-gpt2") == cli.REFUSED
    assert "have none in common" in capsys.readouterr().err
    search = flags(**SMALL, **{**SEARCH, "model": "random:tiny-gpt2"}, prior=prior, out=tmp_path / "none")
    assert cli.main([*search, "--quiet"]) == cli.REFUSED
    assert not (tmp_path / "none").exists()


def test_a_prior_that_lacks_a_site_of_its_own_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = json.loads(searched(tmp_path / "run", budget=0).read_text())
    values["sites"] = values["sites"][:-3]  # gate, up and down, which a bond may join
    del values["schedule_digest"]
    values["kept_fraction"] = sum(site["parameters"] for site in values["sites"]) / sum(
        site["shape"][0] * site["shape"][1] for site in values["sites"]
    )
    path = tmp_path / "cut.json"
    path.write_text(json.dumps(values))
    capsys.readouterr()
    assert applied(path, tmp_path / "out") == cli.REFUSED
    assert "the prior lacks model.layers.2.mlp." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_search_starts_from_a_prior_and_a_resumed_one_insists_on_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prior = searched(tmp_path / "run", seed=0)
    started = searched(tmp_path / "warm", agent="lagrangian", budget=1, prior=prior)
    made = {score.schedule: score for score in Prior.read(prior).scores}["searched"]
    summary = json.loads((tmp_path / "warm" / "summary.json").read_text())
    rows = {row["schedule"]: row for row in summary["rows"]}
    assert list(rows)[-3:] == ["lagrangian", "prior", "searched"]
    difference = rows["prior"]["kl"] - rows["lagrangian"]["kl"]
    assert summary["prior_against_lagrangian_kl"]["value"] == pytest.approx(difference)
    assert made.kl is not None
    assert rows["prior"]["kl"] == pytest.approx(made.kl.value, rel=0.2)  # up to a step of χ at a site or two
    # What meets the closed form at the end is the prior, whatever the agent did.
    assert rows["searched"]["kl"] in (rows["prior"]["kl"], rows["lagrangian"]["kl"])
    capsys.readouterr()
    assert cli.main(["--resume", str(tmp_path / "warm"), "--prior", str(started), "--quiet"]) == cli.REFUSED
    assert "prior was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "content", "message"),
    [
        (["apply"], "{}", "format must be 'chisel-prior'"),
        (["search"], "{}", "format must be 'chisel-prior'"),
        (["apply"], None, "cannot read the prior"),
        (["search"], None, "--prior must be an existing prior.json"),
    ],
)
def test_a_bad_prior_is_refused_before_the_model_is_loaded(
    command: list[str], content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prior.json"
    if content is not None:
        path.write_text(content)
    assert cli.main([*command, "--model", "random:nothing", "--prior", str(path), "--quiet"]) == cli.REFUSED
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_search_from_a_chi_above_the_largest_is_refused_with_advice_that_helps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = json.loads(searched(tmp_path / "run", budget=0).read_text())
    site = next(site for site in values["sites"] if site["topology"] == "pivoted-lowrank")
    outputs, inputs = site["shape"]
    more = outputs * inputs - site["parameters"]
    site |= {"chi": min(outputs, inputs), "parameters": outputs * inputs}
    values["kept_fraction"] += more / sum(site["shape"][0] * site["shape"][1] for site in values["sites"])
    values["schedule_digest"] = None
    too_large = tmp_path / "large.json"
    too_large.write_text(json.dumps(values))
    search = flags(**SMALL, **SEARCH)
    assert cli.main([*search, "--prior", str(too_large), "--dry-run"]) == cli.REFUSED
    assert "; search.py apply --clamp lowers it" in capsys.readouterr().err
    assert applied(too_large, tmp_path / "lowered", "--clamp", "--no-measure") == cli.DONE
    assert cli.main([*search, "--prior", str(tmp_path / "lowered" / "prior.json"), "--dry-run"]) == cli.DONE


@pytest.mark.slow
def test_the_modules_of_a_schedule_can_be_had_in_place(tmp_path: Path) -> None:
    prior = Prior.read(searched(tmp_path / "run", budget=0))
    config = Config.of({**SMALL, "model": "random:tiny-llama", "target_kept": 0.7})
    device = torch.device("cpu")
    loaded, sites = open_model(config, device)
    experiment = Experiment.of(config, loaded, sites, device)
    before = dict(loaded.model.named_modules())
    applier = compress_(experiment, prior.schedule)
    for name, choice in prior.schedule:
        assert isinstance(loaded.model.get_submodule(name), MPOLinear) != choice.is_plain
    applier.restore_()
    assert dict(loaded.model.named_modules()) == before
