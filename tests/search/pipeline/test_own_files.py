"""A run on the user's own text, code and devices: what it records, and what later commands check."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_data import fake_data, jsonl
from own_code import model_with_code, run_afresh
from small_run import HEAL, HEALED, words

from search import cli
from search.priors.format import Prior
from search.runtime.files import file_digest

__all__ = ["fake_data"]


def chats(path: Path, count: int = 100) -> Path:
    """Chats that share nothing with any other text."""
    said = [" ".join(f"mine{number}x{word}" for word in range(30)) for number in range(count)]
    return jsonl(path, [{"messages": [{"role": "user", "content": text}]} for text in said])


def flags(folder: Path, **changes: object) -> list[str]:
    return words(out=folder, calibration_tokens=600, **changes)


@pytest.mark.slow
@pytest.mark.usefixtures("fake_data")
def test_a_run_records_its_own_files_and_every_later_command_refuses_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_afresh(monkeypatch, tmp_path)
    model, text, folder = model_with_code(tmp_path / "own"), chats(tmp_path / "mine.jsonl"), tmp_path / "run"
    given = {"model": model, "calibration": text, "device_map": "cpu,cpu", "export": "dense", "budget": 2, **HEAL}
    switches = ["--trust-remote-code", "--calibration-for-search"]
    assert cli.main([*flags(folder, **given), *switches]) == cli.DONE
    recorded = {"calibration": file_digest(text), "code/own_code.py": file_digest(model / "own_code.py")}
    assert json.loads((folder / "config.json").read_text())["digests"] == recorded
    assert Prior.read(folder / "prior.json").configuration["digests"] == recorded
    assert [row["schedule"] for row in json.loads((folder / "summary.json").read_text())["rows"]] == HEALED
    assert (folder / "dense" / "own_code.py").read_bytes() == (model / "own_code.py").read_bytes()
    say = ["--prompt", "abc", "--tokens", "2", "--quiet"]
    assert cli.main(["generate", str(folder / "dense"), *say]) == cli.REFUSED
    assert cli.main(["generate", str(folder / "dense"), *say, "--trust-remote-code"]) == cli.DONE
    capsys.readouterr()
    later = (
        ["resume", str(folder), "--quiet"],
        ["export", str(folder), "--out", str(tmp_path / "x"), "--format", "dense", "--state", "searched", "--quiet"],
        ["heal", str(folder), "--tokens", "100", "--quiet"],
        ["benchmark", str(folder), "--samples", "2", "--tasks", "piqa", "--quiet"],
    )
    for command in (*later, ["benchmark", str(folder / "prior.json"), "--tasks", "piqa", "--quiet"]):
        assert cli.main(command) == cli.REFUSED, command
        assert "(code/own_code.py); if you trust it, add --trust-remote-code" in capsys.readouterr().err
    for file, name in ((text, "mine.jsonl"), (model / "own_code.py", "own_code.py of")):
        content = file.read_bytes()
        file.write_bytes(content + b"\n")
        for command in later:
            assert cli.main([*command, "--trust-remote-code"]) == cli.REFUSED, command
            error = capsys.readouterr().err
            assert name in error
            assert "is not what the run used: its sha256 was" in error
            assert error.count("\n") == 1
        file.write_bytes(content)
    assert cli.main([*later[1], "--device", "cpu", "--trust-remote-code"]) == cli.DONE


@pytest.mark.usefixtures("fake_data")
def test_the_dry_run_says_what_the_text_is_and_what_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = chats(tmp_path / "mine.jsonl")
    heard = {"text": "What is fact 1 of anatomy (test)?"}
    text.write_text(text.read_text() + json.dumps(heard) + "\n")
    assert cli.main([*flags(tmp_path / "run", calibration=text), "--dry-run"]) == cli.DONE
    said = capsys.readouterr().out
    assert "mine.jsonl" in said
    assert "1 of 101 documents" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("fake_data")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": "absent.txt"}, "--calibration must be an existing file, or the hub id of a data set"),
        ({"device_map": "cuda:0"}, "device must exist"),
    ],
)
def test_own_files_that_cannot_be_used_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], message: str
) -> None:
    assert cli.main(flags(tmp_path / "run", **changes)) == cli.REFUSED
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("fake_data")
def test_a_bad_line_is_refused_before_the_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "mine.jsonl"
    text.write_text('{"text": "x"}\n{"words": "y"}\n')
    assert cli.main(flags(tmp_path / "run", calibration=text)) == cli.REFUSED
    assert "mine.jsonl, line 2: must have text, messages" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("fake_data")
def test_a_model_with_its_own_code_is_not_searched_for_a_form_it_cannot_be_exported_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_afresh(monkeypatch, tmp_path)
    model = model_with_code(tmp_path / "own")
    for form, message in (("hf", "export it as dense"), ("gguf-ready", "takes no OwnModel")):
        assert cli.main([*flags(tmp_path / form, model=model, export=form), "--trust-remote-code"]) == cli.REFUSED
        assert message in capsys.readouterr().err
        assert not (tmp_path / form).exists()
