"""The whole job on tiny random models and hand-made data: what it writes, repeats, resumes and refuses."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from fake_data import fake_data, jsonl
from finished_runs import run, trials
from small_run import HEAL, HEALED, NAMES, words

from agents import SavedPolicy
from compression import Choice, Schedule
from search import cli
from search.config import Config
from search.experiment import open_model
from search.model import random_models
from search.priors.format import Prior

__all__ = ["fake_data"]
KEYS = {
    "schedule",
    "kept_fraction",
    "kl",
    "perplexity",
    "perplexity_prose",
    "perplexity_exam",
    "accuracy",
    "expected_accuracy",
    "items",
    "parameters",
    "bytes",
}


@pytest.mark.slow
@pytest.mark.usefixtures("fake_data")
def test_a_run_writes_the_table_the_study_and_the_prior(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = run(tmp_path / "run", **HEAL)
    rows = document["rows"]
    assert [row["schedule"] for row in rows] == HEALED
    assert all(row.keys() >= KEYS for row in rows)
    assert all(row["items"] == 6 for row in rows)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["kept_fraction"] == 1
    assert all(0.6 < row["kept_fraction"] <= 0.7 for row in rows[1:])
    assert all(row["kl"] > 0 for row in rows[1:])
    assert {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")} == {
        "config.json",
        "digest.json",
        "environment.json",
        "healed",
        "policy.json",
        "policy.safetensors",
        "prior.json",
        "repaired",
        "report.html",
        "scores.json",
        "stages.csv",
        "study.db",
        "summary.csv",
        "summary.json",
        "tensorboard",
        "trials.csv",
    }
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert [title for title in ("Bond dimensions", "The search", "Speed") if f"<h2>{title}" not in page] == []
    assert len(trials(tmp_path / "run")) == 3  # one of the six evaluations has slopes, which cost four
    out, _ = capsys.readouterr()
    assert all(name in out for name in HEALED)


@pytest.mark.slow
@pytest.mark.usefixtures("fake_data")
def test_the_prior_describes_the_searched_schedule(tmp_path: Path) -> None:
    document = run(tmp_path / "run", budget=2)
    prior = json.loads((tmp_path / "run" / "prior.json").read_text())
    searched = document["rows"][-1]
    choices = [
        (site["name"], Choice(site["topology"], site.get("chi", 0), site.get("metric", "none"), widths))
        for site in prior["sites"]
        for widths in [tuple(bond["width"] for bond in site.get("bonds", ()))]
    ]
    assert any(choice.widths for _, choice in choices)
    assert Schedule(tuple(choices)).digest == prior["schedule_digest"]
    parameters = sum(site["parameters"] for site in prior["sites"])
    dense = sum(site["shape"][0] * site["shape"][1] for site in prior["sites"])
    assert parameters / dense == pytest.approx(searched["kept_fraction"])
    assert prior["format"] == "chisel-prior"
    assert len(prior["sites"]) == 21
    read = Prior.read(tmp_path / "run" / "prior.json")
    assert read.schedule.digest == prior["schedule_digest"]
    assert read.bytes_fraction == searched["bytes_fraction"]
    assert [score.schedule for score in read.scores] == NAMES
    assert all(site.offset is not None for site in read.sites)


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_heads_are_compressed_one_by_one_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run(tmp_path / "whole", budget=0, agent="lagrangian")["rows"]
    assert cli.main([*words(out=tmp_path / "run", budget=1), "--per-head"]) == cli.DONE
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]
    sites = json.loads((tmp_path / "run" / "prior.json").read_text())["sites"]
    assert len(sites) == 3 * (4 + 2 + 2 + 4 + 3)
    assert rows[0]["parameters"] == whole[0]["parameters"]
    assert rows[0]["perplexity"] == pytest.approx(whole[0]["perplexity"], rel=1e-4)
    capsys.readouterr()
    flags = words(out=tmp_path / "none", model="random:tiny-qwen2", budget=0)
    assert cli.main([*flags, "--per-head", "--dry-run", "--json"]) == cli.DONE
    assert json.loads(capsys.readouterr().out)["model"]["families"] == ["q", "k", "v", "o", "gate", "up", "down"]


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_an_attention_head_can_be_one_decision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = words(out=tmp_path / "run", budget=2, granularity="head")
    assert cli.main([*flags, "--per-head"]) == cli.DONE
    steps = json.loads((tmp_path / "run" / "policy.json").read_text())["steps"]
    assert steps[:3] == ["block_00_head_00", "block_00_head_01", "block_00_other"]
    capsys.readouterr()
    assert cli.main(flags) == cli.REFUSED
    assert "granularity head needs per_head" in capsys.readouterr().err


@pytest.mark.usefixtures("fake_data")
@pytest.mark.parametrize("agent", ["reinforce", "ppo"])
@pytest.mark.slow
def test_a_search_starts_from_what_an_earlier_one_learned(tmp_path: Path, agent: str) -> None:
    run(tmp_path / "first", agent=agent)
    learned = SavedPolicy.read(tmp_path / "first")
    # A policy that has gone far, so that it can be told from the closed form.
    key = "mean" if agent == "reinforce" else "action_net.linear.weight"
    far = learned.arrays[key].copy()
    far.reshape(-1)[-2:] = 10.0
    replace(learned, arrays={**learned.arrays, key: far}).write(tmp_path / "first")
    other = dict(agent=agent, target_kept=0.8, budget=1)
    run(tmp_path / "second", policy=tmp_path / "first", **other)
    run(tmp_path / "plain", **other)
    assert trials(tmp_path / "second") != trials(tmp_path / "plain")
    again = SavedPolicy.read(tmp_path / "second")
    assert again.target_kept == 0.8
    assert all(
        (again.arrays[name] == values).all() for name, values in SavedPolicy.read(tmp_path / "first").arrays.items()
    )


@pytest.mark.usefixtures("fake_data")
@pytest.mark.parametrize("goal", ["memory", "latency"])
@pytest.mark.slow
def test_the_searched_schedule_is_timed_against_the_dense_model(tmp_path: Path, goal: str) -> None:
    document = run(tmp_path / "run", budget=0, agent="lagrangian", optimize=goal, **HEAL)
    latency = document["latency"]
    assert latency["optimize"] == goal
    assert min(latency["prefill_ratio"], latency["decode_ratio"]) > 0
    assert latency["resident_bytes"] >= latency["stored_bytes"]
    timed = {row["schedule"]: row.get("prefill_ratio") for row in document["rows"]}
    assert timed["healed"] == timed["repaired"] == timed["searched"] == latency["prefill_ratio"]
    assert min(timed["uniform"], timed["lagrangian"]) > 0
    assert timed["dense"] is timed["uniform-plain"] is None
    table = list(csv.DictReader((tmp_path / "run" / "summary.csv").read_text().splitlines()))
    assert [line["schedule"] for line in table] == HEALED
    assert float(table[-1]["decode_ratio"]) == latency["decode_ratio"]


@pytest.mark.usefixtures("fake_data")
@pytest.mark.parametrize("model", ["random:tiny-gpt2", "random:tiny-gemma2"])
@pytest.mark.slow
def test_other_architectures_run_too(tmp_path: Path, model: str) -> None:
    rows = run(tmp_path / "run", model=model, budget=2, **HEAL)["rows"]
    assert [row["schedule"] for row in rows] == HEALED
    assert rows[-1]["kl"] <= rows[1]["kl"]


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_the_same_seed_gives_the_same_trials_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / name, agent="evolution", seed=seed, budget=4)
    assert trials(tmp_path / "a") == trials(tmp_path / "b")
    assert trials(tmp_path / "a") != trials(tmp_path / "c")


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_a_damaged_cache_is_said_and_the_trials_are_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factors = tmp_path / "cache" / "factors"
    shutil.rmtree(factors)  # only the files of this run
    run(tmp_path / "a", budget=2)
    files = list(factors.rglob("*.safetensors"))
    for file in files:
        file.write_bytes(file.read_bytes()[:50])
    capsys.readouterr()
    assert cli.main(words(out=tmp_path / "b", budget=2)[:-1]) == cli.DONE
    assert capsys.readouterr().err.count("is damaged; set aside and rebuilt\n") == len(files) > 0
    assert trials(tmp_path / "a") == trials(tmp_path / "b")


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_bfloat16_runs_too(tmp_path: Path) -> None:
    rows = run(tmp_path / "run", budget=2, dtype="bfloat16", **HEAL)["rows"]
    single = rows[0]["parameters"] * 2
    assert rows[0]["bytes"] == single
    assert rows[4]["kl"] < rows[1]["kl"]


@pytest.mark.slow
@pytest.mark.usefixtures("fake_data")
@pytest.mark.parametrize("agent", ["uniform", "lagrangian", "random"])
def test_every_agent_ends_within_its_budget(tmp_path: Path, agent: str) -> None:
    document = run(tmp_path / "run", agent=agent, budget=3)
    assert document["trials"] == (3 if agent == "random" else 1)


@pytest.mark.slow
@pytest.mark.usefixtures("fake_data")
def test_a_jsonl_file_serves_as_the_proxy(tmp_path: Path) -> None:
    records = [{"question": f"What is {n}?", "choices": ["one", "two", f"{n}"], "answer": n % 3} for n in range(40)]
    proxy = jsonl(tmp_path / "exam.jsonl", records)
    assert run(tmp_path / "run", proxy=proxy, budget=1)["rows"][0]["items"] == 6


@pytest.mark.usefixtures("fake_data")
def test_a_dry_run_tells_sites_ladder_cost_data_and_output_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words(out=tmp_path / "run"), "--dry-run", "--json"]) == cli.DONE
    told = json.loads(capsys.readouterr().out)
    assert told["model"]["sites"] == 21
    assert told["search"]["reachable_kept"].startswith("0.")
    assert told["cost"]["estimated_minutes"] == pytest.approx(sum(told["seconds"].values()) / 60, abs=0.2)
    assert list(told["needs"]) == ["load", "calibrate", "decompose"]
    assert told["data"]["calibration_tokens"] == 1500
    assert told["output"] == str(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("fake_data")
def test_what_stays_dense_is_told_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = open_model.load_model

    def share_a_weight(*args: Any) -> Any:
        loaded = load(*args)
        first, second = (loaded.model.model.layers[block].mlp.up_proj for block in (0, 1))
        second.weight = first.weight
        return loaded

    monkeypatch.setattr(open_model, "load_model", share_a_weight)
    flags = words(out=tmp_path / "run", budget=2)
    assert cli.main([flag for flag in flags if flag != "--quiet"]) == cli.DONE
    name, reason = "model.layers.0.mlp.up_proj", "shared by model.layers.0.mlp.up_proj and model.layers.1.mlp.up_proj"
    told = f"1 of 20 sites stay dense and are counted as dense: 7.1% of the parameters, such as {name} ({reason})"
    assert told in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stays_dense"] == {name: reason}
    sites = {site["name"]: site for site in json.loads((tmp_path / "run" / "prior.json").read_text())["sites"]}
    assert sites[name]["dense_because"] == reason
    assert sites[name]["parameters"] == 32 * 48
    assert cli.main([*words(out=tmp_path / "other"), "--dry-run", "--json"]) == cli.DONE
    assert json.loads(capsys.readouterr().out)["model"]["stays_dense"] == {name: reason}


@pytest.mark.slow
@pytest.mark.usefixtures("fake_data")
def test_a_baseline_that_prime_dimensions_rule_out_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        random_models, "TINY_SHAPE", {**random_models.TINY_SHAPE, "hidden_size": 13, "num_attention_heads": 1}
    )
    rows = run(tmp_path / "run", model="random:tiny-gpt2", budget=2, target_kept=0.25)["rows"]
    assert [row["schedule"] for row in rows] == [name for name in NAMES if name != "uniform-plain"]


def test_defaults_are_what_the_readme_says() -> None:
    config = Config()
    assert (config.agent, config.budget, config.target_kept, config.proxy) == ("gradient", 200, 0.8, "mmlu")


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_the_reward_has_the_weights_that_were_given(tmp_path: Path) -> None:
    run(tmp_path / "plain", budget=2)
    run(tmp_path / "weighted", budget=2, kl_weight=0.0, correct_weight=0.0, compression_weight=2.0)
    (_, plain), (_, weighted) = ([trial[2] for trial in trials(tmp_path / name)] for name in ("plain", "weighted"))
    assert weighted == pytest.approx(2 * 0.3, abs=0.02)
    assert plain != weighted


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_trials_can_be_scored_after_a_repair_and_by_time(tmp_path: Path) -> None:
    for name, how in (("plain", {}), ("repaired", {"reward_repair_tokens": 512}), ("timed", {"latency_weight": 0.1})):
        run(tmp_path / name, budget=2, agent="random", **how)
    plain, repaired = trials(tmp_path / "plain"), trials(tmp_path / "repaired")
    assert [trial[1] for trial in plain] == [trial[1] for trial in repaired]
    assert [trial[2] for trial in plain] != [trial[2] for trial in repaired]
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path / 'timed' / 'study.db'}")
    assert all(trial.user_attrs["time_fraction"] > 0 for trial in study.trials)
