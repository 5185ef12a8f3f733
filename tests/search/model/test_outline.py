"""A large model is planned with from its header: the same sites, bonds and plan as with its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fake_data import fake_data
from small_run import words
from tiny_gguf import written

from search import cli
from search.config import Config
from search.experiment.open_model import open_model
from search.model import loading, outline, pretrained
from search.model.loading import load_model
from search.model.outline import UNREAD
from search.model.outline import outline as outlined

__all__ = ["fake_data"]
CPU = torch.device("cpu")


@pytest.fixture(params=["folder", "gguf"])
def name(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model that counts as large."""
    monkeypatch.setattr(outline, "LARGE", 0)
    if request.param == "gguf":
        written(tmp_path / "tiny.gguf")
        return str(tmp_path / "tiny.gguf")
    loaded = load_model("random:tiny-llama", "cpu")
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_an_outline_has_the_sites_bonds_and_tokens_of_the_model(name: str) -> None:
    config = Config.of({"model": name})
    found = outlined(name, CPU, torch.float32)
    assert found is not None
    assert (found.is_outline, found.digest) == (True, UNREAD)
    loaded, sites = open_model(config, CPU)
    assert open_model(config, CPU, found)[1] == sites
    assert any(site.cuts for site in sites)
    shapes = {path: parameter.shape for path, parameter in loaded.model.named_parameters()}
    assert {path: parameter.shape for path, parameter in found.model.named_parameters()} == shapes
    assert (found.architecture, found.vocabulary) == (loaded.architecture, loaded.vocabulary)
    assert found.encode("Question: why?") == loaded.encode("Question: why?")
    largest = max(shape.numel() for shape in shapes.values())
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in found.model.parameters()}
    assert sum(storages.values()) <= 4 * (largest + sum(shape.numel() for shape in shapes.values() if len(shape) == 1))


@pytest.mark.usefixtures("fake_data")
def test_a_dry_run_of_a_large_model_reads_no_weights_and_plans_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*words(out=tmp_path / "run", model=name), "--dry-run", "--json"]

    def read(*args: object) -> None:
        raise AssertionError("weights were read")

    with monkeypatch.context() as patch:
        for where in (loading, pretrained):
            patch.setattr(where, "read_pretrained", read)
        patch.setattr(loading, "read_gguf", read)
        assert cli.main(flags) == cli.DONE
    large = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(outline, "LARGE", 1 << 30)
    assert cli.main(flags) == cli.DONE
    small = json.loads(capsys.readouterr().out)
    for plan in (large, small):
        assert plan["cost"].pop("estimated_minutes") >= 0
        assert min(plan.pop("seconds").values()) >= 0
    assert large == small
