"""What a run refuses, before anything is written."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import pytest
from fake_data import fake_data
from finished_runs import run
from malicious import Malicious
from small_run import SMALL, words

from search import cli
from search.config import Config
from search.experiment import open_model
from search.runtime.run_folder import RunFolder

__all__ = ["fake_data"]


@pytest.mark.slow
@pytest.mark.usefixtures("fake_data")
@pytest.mark.parametrize("form", ["any", "plain"])
def test_a_policy_over_units_is_continued_at_another_target(tmp_path: Path, form: str) -> None:
    run(tmp_path / "first", budget=1, form=form)
    run(tmp_path / "second", budget=1, form=form, target_kept=0.3, policy=tmp_path / "first")


@pytest.mark.slow
@pytest.mark.usefixtures("fake_data")
def test_a_policy_of_another_agent_or_model_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "first", budget=1)
    for changes, message in (
        ({"agent": "ppo"}, "the policy was learned by agent reinforce and cannot be continued by ppo"),
        ({"model": "random:tiny-qwen2"}, "the policy was learned on another model"),
        ({"granularity": "family"}, "the policy was learned on other steps"),
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
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_kept": 0.01, "form": "factors"}, "--target-kept must be at least"),
        ({"form": "factors", "width_multiple": 8}, "width_multiple needs form any or plain"),
        (
            {"width_multiple": 48},
            "--width-multiple must be at most 24 for a choice of widths of random:tiny",
        ),
        ({"model": "random:tiny-gpt2", "form": "plain", "target_kept": 0.1}, "--target-kept must be at least"),
        ({"model": "random:tiny-lama"}, "random:tiny-llama"),
        ({"device": "cuda:7"}, "device must exist"),
        (
            {"evaluators": 2, "ray_address": "127.0.0.1:9"},
            "'127.0.0.1:9' cannot be used: Connection refused",
        ),
        ({"evaluators": 2, "ray_address": "127.0.0.1:99999"}, "ray_address '127.0.0.1:99999' cannot be used"),
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
    monkeypatch.setattr(open_model, "load_model", lambda *_: pytest.fail("the model was loaded"))
    assert cli.main(words(out=tmp_path / "run", proxy=proxy)) == cli.REFUSED
    assert "line 2" in capsys.readouterr().err.replace(":2:", " line 2")


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


def test_a_second_run_in_a_folder_is_refused_and_told_who_holds_it_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(open_model, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with RunFolder.new(str(tmp_path), "random", "m", 0) as folder:
        for commands in ([words(out=tmp_path)], [words(out=tmp_path), words(resume=tmp_path)]):
            for command in commands:
                assert cli.main(command) == cli.REFUSED
                assert f"is in use by process {os.getpid()} on " in capsys.readouterr().err
            folder.write_text("config.json", Config.of(SMALL).to_json())


@pytest.mark.usefixtures("fake_data")
@pytest.mark.parametrize("changes", [{"form": "plain"}, {"width_multiple": 2}])
def test_widths_of_a_model_whose_matrices_are_not_joined_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    monkeypatch.setattr(open_model, "discover_bonds", lambda *_: ())
    assert cli.main(words(out=tmp_path / "run", **changes)) == cli.REFUSED
    _, err = capsys.readouterr()
    assert "no MLP and no attention of random:tiny-llama can lose units by itself" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
