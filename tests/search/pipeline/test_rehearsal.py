"""What would be refused at the end of a run is refused at its start, and by a dry run too."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fake_data import fake_data
from small_run import words

from compression.refusal import Refusal
from compression.storage import strict_json
from search import cli
from search.experiment.calibration import Calibration
from search.export import folder
from search.model.loading import load_model
from search.pipeline import rehearsal

__all__ = ["fake_data"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a folder."""
    loaded = load_model("random:tiny-llama", "cpu")
    path = tmp_path_factory.mktemp("models") / "model"
    loaded.model.save_pretrained(path)
    loaded.tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def refusal(fake_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """A function that returns the line that refuses a run, which must come before any work, and a dry run alike."""
    monkeypatch.setattr(Calibration, "__call__", lambda self: pytest.fail("it was calibrated"))

    def refused(**changes: object) -> str:
        lines = []
        for dry in ([], ["--dry-run"]):
            assert cli.main([*words(**{"out": tmp_path / "run", **changes}), *dry]) == cli.REFUSED
            lines.append(capsys.readouterr().err)
        assert lines[0] == lines[1]
        assert lines[0].count("\n") == 1
        assert not (tmp_path / "run").exists()
        return lines[0]

    return refused


@pytest.mark.parametrize("name", ["a..b", "ideographic\u3000space", "no\xa0break", "~x", "back\\slash", "x" * 201])
def test_a_model_whose_name_no_prior_may_have_is_refused_first(name, refusal, saved, tmp_path):
    shutil.copytree(saved, tmp_path / name)
    assert "model.id: must " in refusal(model=tmp_path / name)


def test_so_is_a_licence_that_no_prior_may_have(refusal, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text(f"---\nlicense: {'a' * 300}\n---\n")
    assert "model.license: must have at most 200 characters" in refusal(model=tmp_path / "model")


def test_so_is_a_model_whose_prior_would_be_too_large_to_be_read(refusal, monkeypatch):
    monkeypatch.setattr(strict_json, "_MOST", 1000)
    assert "it holds too many values" in refusal()


def test_so_is_a_model_that_cannot_be_healed(refusal, monkeypatch):
    def refuse(model):
        raise Refusal("healing needs another head")

    monkeypatch.setattr(rehearsal, "output_head", refuse)
    assert "healing needs another head" in refusal(heal_minutes=0.01)


def test_so_is_an_export_that_another_program_could_not_read(refusal, monkeypatch):
    monkeypatch.setattr(folder, "CONVERTIBLE", ())
    assert "llama.cpp's converter takes no LlamaForCausalLM" in refusal(export="gguf-ready")


def test_so_is_a_tokenizer_that_cannot_be_saved(refusal, monkeypatch):
    def fail(self, folder):
        raise ValueError("no vocabulary\nmore")

    monkeypatch.setattr(type(load_model("random:tiny-llama", "cpu").tokenizer), "save_pretrained", fail)
    assert "transformers cannot save this model: no vocabulary; correct" in refusal(export="hf")


def test_so_is_a_search_that_leaves_a_benchmark_nothing_to_report_on(refusal, monkeypatch):
    def refuse(*arguments):
        raise Refusal("boolq has no item left to report on")

    monkeypatch.setattr(rehearsal, "check_remaining", refuse)
    assert "no item left" in refusal(benchmark_items=2)


@pytest.mark.parametrize("place", ["/proc/self/status/x", "/tmp/" + "d" * 300, "/tmp" + 20 * ("/" + "d" * 200)])
def test_so_is_a_folder_that_cannot_be_written(place, refusal):
    assert "a folder" in refusal(out=place)
