"""The whole job on tiny random models and hand-made data: what it writes, repeats, resumes and refuses."""

from __future__ import annotations

import csv
import json
import os
import pickle
import re
import sqlite3
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from fake_data import fake_data, jsonl
from small_run import HEAL, HEALED, NAMES, SMALL, words
from torch import nn

from agents import SavedPolicy
from compression import Choice, Schedule
from search import cli
from search.config import Config
from search.evaluation.evaluator import ModelEvaluator
from search.evaluation.workload import Workload
from search.experiment import experiment
from search.export.restore import restore
from search.healing import repaired_start
from search.healing.repaired_start import repair_did_harm
from search.model import random_models
from search.model.loading import load_model
from search.priors.format import Prior
from search.runtime.console import Console
from search.runtime.run_folder import RunFolder
from search.trials import setup

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


def trials(folder: Path) -> list[tuple[object, ...]]:
    """What identifies the trials of a run, wall time left out."""
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{folder / 'study.db'}")
    return [
        (
            trial.user_attrs["trial.number"],
            trial.user_attrs["schedule.digest"],
            trial.value,
            tuple(trial.params.items()),
        )
        for trial in study.trials
    ]


def run(folder: Path, **changes: object) -> dict[str, Any]:
    assert cli.main(words(out=folder, **changes)) == cli.DONE
    document = json.loads((folder / "summary.json").read_text())
    assert isinstance(document, dict)
    return document


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
        "environment.json",
        "healed",
        "policy.json",
        "policy.safetensors",
        "prior.json",
        "repaired",
        "report.html",
        "study.db",
        "summary.csv",
        "summary.json",
        "tensorboard",
        "trials.csv",
    }
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert [title for title in ("Bond dimensions", "The search", "Speed") if f"<h2>{title}" not in page] == []
    assert len(trials(tmp_path / "run")) == 6
    out, _ = capsys.readouterr()
    assert all(name in out for name in HEALED)


@pytest.mark.usefixtures("fake_data")
def test_the_prior_describes_the_searched_schedule(tmp_path: Path) -> None:
    document = run(tmp_path / "run", budget=2)
    prior = json.loads((tmp_path / "run" / "prior.json").read_text())
    searched = document["rows"][-2]
    choices = [
        (site["name"], Choice(site["topology"], site.get("chi", 0), site.get("metric", "none")))
        for site in prior["sites"]
    ]
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
    assert all(site.sensitivity is not None and site.offset is not None for site in read.sites)


@pytest.mark.usefixtures("fake_data")
def test_heads_are_compressed_one_by_one_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run(tmp_path / "whole", budget=0, agent="lagrangian", repair_tokens=0)["rows"]
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
def test_a_search_starts_from_what_an_earlier_one_learned(tmp_path: Path, agent: str) -> None:
    run(tmp_path / "first", agent=agent)
    learned = SavedPolicy.read(tmp_path / "first")
    # A policy that has gone far, so that it can be told from the closed form.
    key = "bias" if agent == "reinforce" else "action_net.linear.weight"
    far = learned.arrays[key].copy()
    far.reshape(-1)[-2:] = 1.0
    replace(learned, arrays={**learned.arrays, key: far}).write(tmp_path / "first")
    other = dict(agent=agent, target_kept=0.8, budget=1, repair_tokens=0)
    run(tmp_path / "second", policy=tmp_path / "first", **other)
    run(tmp_path / "plain", **other)
    assert trials(tmp_path / "second") != trials(tmp_path / "plain")
    again = SavedPolicy.read(tmp_path / "second")
    assert again.target_kept == 0.8
    assert all(
        (again.arrays[name] == values).all() for name, values in SavedPolicy.read(tmp_path / "first").arrays.items()
    )


@pytest.mark.usefixtures("fake_data")
def test_a_policy_of_another_agent_or_model_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "first", budget=1)
    for changes, message in (
        ({"agent": "ppo"}, "the policy was learned by agent reinforce and cannot be continued by ppo"),
        ({"model": "random:tiny-qwen2"}, "the policy was learned on another model"),
    ):
        capsys.readouterr()
        assert cli.main(words(out=tmp_path / "other", policy=tmp_path / "first", **changes)) == cli.REFUSED
        _, err = capsys.readouterr()
        assert message in err
        assert err.count("\n") == 1
        assert not (tmp_path / "other").exists()
    (tmp_path / "first" / "policy.safetensors").write_bytes(b"cut")
    assert cli.main(words(out=tmp_path / "other", policy=tmp_path / "first")) == cli.REFUSED
    assert "policy.safetensors is truncated" in capsys.readouterr().err


@pytest.mark.usefixtures("fake_data")
@pytest.mark.parametrize("goal", ["memory", "latency"])
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
@pytest.mark.parametrize("model", ["random:tiny-gpt2", "random:tiny-qwen2"])
def test_other_architectures_run_too(tmp_path: Path, model: str) -> None:
    rows = run(tmp_path / "run", model=model, budget=2, **HEAL)["rows"]
    assert [row["schedule"] for row in rows] == HEALED
    assert rows[-1]["kl"] <= rows[1]["kl"]


@pytest.mark.usefixtures("fake_data")
def test_the_model_is_dense_again_after_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    load = experiment.load_model

    def remember(*args: Any) -> Any:
        loaded = load(*args)
        state = {name: value.clone() for name, value in loaded.model.state_dict().items()}
        seen.append((loaded.model, state))
        return loaded

    monkeypatch.setattr(experiment, "load_model", remember)
    run(tmp_path / "run", budget=2, **HEAL)
    [(model, before)] = seen
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.usefixtures("fake_data")
def test_the_same_seed_gives_the_same_trials_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / name, seed=seed, budget=4, repair_tokens=0)
    assert trials(tmp_path / "a") == trials(tmp_path / "b")
    assert trials(tmp_path / "a") != trials(tmp_path / "c")


@pytest.mark.usefixtures("fake_data")
def test_a_damaged_cache_is_said_and_the_trials_are_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "a", budget=2)
    files = list((tmp_path / "cache" / "factors").rglob("*.safetensors"))
    for file in files:
        file.write_bytes(file.read_bytes()[:50])
    capsys.readouterr()
    assert cli.main(words(out=tmp_path / "b", budget=2)[:-1]) == cli.DONE
    assert capsys.readouterr().err.count("is damaged; set aside and rebuilt\n") == len(files) > 0
    assert trials(tmp_path / "a") == trials(tmp_path / "b")


@pytest.mark.usefixtures("fake_data")
@pytest.mark.parametrize("agent, budget", [("reinforce", 6), ("gradient", 18)])
def test_an_interrupted_run_resumes_to_the_trials_of_an_undisturbed_one(
    agent: str, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(tmp_path / "whole", agent=agent, budget=budget)
    evaluate, calls = ModelEvaluator.evaluate, []

    def stop_at_the_fourth(self: ModelEvaluator, schedules: Any, **how: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return evaluate(self, schedules, **how)

    monkeypatch.setattr(ModelEvaluator, "evaluate", stop_at_the_fourth)
    assert cli.main(words(out=tmp_path / "cut", agent=agent, budget=budget)) == 130
    assert "--resume" in capsys.readouterr().err
    assert len(trials(tmp_path / "cut")) == 3
    monkeypatch.setattr(ModelEvaluator, "evaluate", evaluate)
    assert cli.main(["--resume", str(tmp_path / "cut")]) == cli.DONE
    counts = [(int(done), int(of)) for done, of in re.findall(r"(\d+)/(\d+) trials", capsys.readouterr().err)]
    assert all(done <= of for done, of in counts)
    assert trials(tmp_path / "cut") == trials(tmp_path / "whole")
    again = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert [row["kl"] for row in again["rows"]] == [row["kl"] for row in whole["rows"]]


@pytest.mark.usefixtures("fake_data")
def test_a_failed_trial_stays_failed_when_the_run_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, calls = Workload.measure, []

    def fail_the_second_trial(self: Workload, model: Any, *how: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("device lost")
        return measure(self, model, *how)

    monkeypatch.setattr(Workload, "measure", fail_the_second_trial)
    assert cli.main(words(out=tmp_path / "run", search_shards=1)) == cli.FAILURES
    before = trials(tmp_path / "run")
    assert [trial[2] is None for trial in before] == [False, True, False, False, False, False]
    monkeypatch.setattr(Workload, "measure", measure)
    assert cli.main(["--resume", str(tmp_path / "run"), "--quiet"]) == cli.FAILURES
    assert trials(tmp_path / "run") == before


@pytest.mark.usefixtures("fake_data")
def test_bfloat16_runs_too(tmp_path: Path) -> None:
    rows = run(tmp_path / "run", budget=2, dtype="bfloat16", **HEAL)["rows"]
    single = rows[0]["parameters"] * 2
    assert rows[0]["bytes"] == single
    assert rows[4]["kl"] < rows[1]["kl"]


@pytest.mark.usefixtures("fake_data")
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


@pytest.mark.usefixtures("fake_data")
@pytest.mark.parametrize("agent", ["uniform", "lagrangian", "random"])
def test_every_agent_ends_within_its_budget(tmp_path: Path, agent: str) -> None:
    document = run(tmp_path / "run", agent=agent, budget=3)
    assert document["trials"] == (3 if agent == "random" else 1)


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
    run(tmp_path / "run", budget=4)
    found = sqlite3.connect(tmp_path / "run" / "study.db").execute("select state, count(*) from trials group by state")
    assert dict(found.fetchall()) == {"COMPLETE": 3, "FAIL": 1}
    header, *lines = (tmp_path / "run" / "trials.csv").read_text().splitlines()
    second = dict(zip(header.split(","), lines[1].split(","), strict=True))
    assert (second["state"], second["reward"], second["accuracy"], second["kl"]) == ("nonfinite", "", "", "")


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
    assert told["cost"]["estimated_minutes"] >= 0
    assert told["data"]["calibration_tokens"] == 1500
    assert told["output"] == str(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("fake_data")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_kept": 0.01}, "--target-kept must be at least"),
        ({"model": "random:tiny-lama"}, "random:tiny-llama"),
        ({"device": "cuda:7"}, "device must exist"),
        ({"proxy": "sciq", "proxy_form": "letter"}, "--proxy-form must be answer"),
        ({"heldout_tokens": 10_000_000}, "there are only"),
    ],
)
def test_bad_input_is_one_line_with_code_2_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], message: str
) -> None:
    assert cli.main(words(out=tmp_path / "run", **changes)) == cli.REFUSED
    _, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("fake_data")
def test_an_unreadable_jsonl_is_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = tmp_path / "exam.jsonl"
    proxy.write_text('{"question": "Q", "choices": ["a", "b"], "answer": 0}\n{"question": "R", "choices": ["a"]\n')
    monkeypatch.setattr(experiment, "load_model", lambda *_: pytest.fail("the model was loaded"))
    assert cli.main(words(out=tmp_path / "run", proxy=proxy)) == cli.REFUSED
    assert "line 2" in capsys.readouterr().err.replace(":2:", " line 2")


class Malicious:
    """Pickled, it makes a folder where it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("protocol", [0, pickle.HIGHEST_PROTOCOL])
def test_a_pickle_offered_as_questions_is_refused_and_not_executed(
    protocol: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy, trace = tmp_path / "exam.jsonl", tmp_path / "trace"
    proxy.write_bytes(pickle.dumps(Malicious(trace), protocol))
    assert cli.main(words(out=tmp_path / "run", proxy=proxy)) == cli.REFUSED
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search("must be UTF-8 text|must be a JSON object", error)
    assert [path.name for path in tmp_path.iterdir()] == ["exam.jsonl"]
    pickle.loads(proxy.read_bytes())
    assert trace.is_dir()


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
        assert re.search("belongs to another search: search_items was [0-9a-f.]+, is [0-9a-f.]+\n", refused())
        exam(tmp_path / "exam.jsonl", "What")
        loaded.model.model.norm.weight.data[0] += 1
        loaded.model.save_pretrained(tmp_path / "model")
        assert re.search("belongs to another search: model was [0-9a-f.]+, is [0-9a-f.]+; ", refused())
    loaded.model.model.norm.weight.data[0] -= 1
    loaded.model.save_pretrained(tmp_path / "model")
    assert cli.main(["resume", str(folder), "--budget", "3", "--quiet"]) == cli.DONE


def exam(path: Path, word: str) -> Path:
    """Questions that begin with `word`."""
    choices = ["one", "two", "three"]
    return jsonl(path, [{"question": f"{word} is {n}?", "choices": choices, "answer": n % 3} for n in range(40)])


def files(folder: Path) -> dict[str, bytes]:
    """Content of everything in a folder, by its place there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_in_a_folder_is_refused_and_told_who_holds_it_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experiment, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with RunFolder.new(str(tmp_path), "random", "m", 0) as folder:
        for commands in ([words(out=tmp_path)], [words(out=tmp_path), words(resume=tmp_path)]):
            for command in commands:
                assert cli.main(command) == cli.REFUSED
                assert f"is in use by process {os.getpid()} on " in capsys.readouterr().err
            folder.write_text("config.json", Config.of(SMALL).to_json())


@pytest.mark.usefixtures("fake_data")
def test_what_stays_dense_is_told_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = experiment.load_model

    def share_a_weight(*args: Any) -> Any:
        loaded = load(*args)
        first, second = (loaded.model.model.layers[block].mlp.up_proj for block in (0, 1))
        second.weight = first.weight
        return loaded

    monkeypatch.setattr(experiment, "load_model", share_a_weight)
    flags = words(out=tmp_path / "run", budget=2)
    assert cli.main([flag for flag in flags if flag != "--quiet"]) == cli.DONE
    name, reason = "model.layers.0.mlp.up_proj", "shared by model.layers.0.mlp.up_proj and model.layers.1.mlp.up_proj"
    assert f"1 of 20 sites stay dense and are counted as dense, such as {name}: {reason}" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stays_dense"] == {name: reason}
    sites = {site["name"]: site for site in json.loads((tmp_path / "run" / "prior.json").read_text())["sites"]}
    assert sites[name]["dense_because"] == reason
    assert sites[name]["parameters"] == 32 * 48
    assert cli.main([*words(out=tmp_path / "other"), "--dry-run", "--json"]) == cli.DONE
    assert json.loads(capsys.readouterr().out)["model"]["stays_dense"] == {name: reason}


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
def test_the_reward_has_the_weights_that_were_given(tmp_path: Path) -> None:
    run(tmp_path / "plain", budget=2)
    run(tmp_path / "weighted", budget=2, kl_weight=0.0, correct_weight=0.0, compression_weight=2.0)
    (_, plain), (_, weighted) = ([trial[2] for trial in trials(tmp_path / name)] for name in ("plain", "weighted"))
    assert weighted == pytest.approx(2 * 0.3, abs=0.02)
    assert plain != weighted


@pytest.mark.usefixtures("fake_data")
def test_trials_can_be_scored_after_a_repair_and_by_time(tmp_path: Path) -> None:
    for name, how in (("plain", {}), ("repaired", {"reward_repair_tokens": 512}), ("timed", {"latency_weight": 0.1})):
        run(tmp_path / name, budget=2, agent="random", repair_tokens=0, **how)
    plain, repaired = trials(tmp_path / "plain"), trials(tmp_path / "repaired")
    assert [trial[1] for trial in plain] == [trial[1] for trial in repaired]
    assert [trial[2] for trial in plain] != [trial[2] for trial in repaired]
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path / 'timed' / 'study.db'}")
    assert all(trial.user_attrs["time_fraction"] > 0 for trial in study.trials)


@pytest.mark.usefixtures("fake_data")
def test_a_run_may_end_with_benchmarks_and_a_folder_that_others_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("search.pipeline.finish.TASKS", ("arc_easy", "boolq"))
    ends = dict(out=tmp_path / "run", budget=0, agent="lagrangian", benchmark_items=2, export="hf", **HEAL)
    loads: list[str] = []
    load = experiment.load_model
    monkeypatch.setattr(experiment, "load_model", lambda name, *how: loads.append(name) or load(name, *how))
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


@pytest.mark.usefixtures("fake_data")
def test_without_repair_it_is_healed_as_it_was_decomposed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli.main(words(out=run, budget=0, agent="lagrangian", repair_tokens=0, **HEAL)) == cli.DONE
    document = json.loads((run / "healed" / "healing.json").read_text())
    assert [row["schedule"] for row in document["rows"]] == ["dense", "searched", "healed"]
    names = [row["schedule"] for row in json.loads((run / "summary.json").read_text())["rows"]]
    assert names == [name for name in HEALED if name != "repaired"]
