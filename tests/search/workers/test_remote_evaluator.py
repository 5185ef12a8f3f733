"""An evaluator of another process refuses a model that is not the run's, before it measures anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fake_data import fake_data
from safetensors.torch import load_file, save_file

from compression import Schedule
from compression.sites import discover_sites
from search.config import Config
from search.model.loading import load_model
from search.workers.remote_evaluator import RemoteEvaluator, portable_fields

__all__ = ["fake_data"]


def other_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def other_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))


def other_tokenizer(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")


@pytest.mark.usefixtures("fake_data")
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(
    ("change", "part"), [(other_weights, "weights"), (other_config, "architecture"), (other_tokenizer, "vocabulary")]
)
def test_another_model_under_the_same_name_is_refused(
    change: Callable[[Path], None], part: str, per_head: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model("random:tiny-llama", "cpu")
    folder = tmp_path / "tiny"
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    run = load_model(str(folder), "cpu", torch.float32)
    change(folder)
    dense = Schedule.dense(tuple(site.name for site in discover_sites(run.model)))
    values = portable_fields(Config.of({"model": str(folder), "device": "cpu", "per_head": per_head}))
    monkeypatch.setattr("search.workers.remote_evaluator.Experiment.of", lambda *_: pytest.fail("it went on"))
    with pytest.raises(ValueError, match=f"has other {part} on .* than in the run; all evaluators need the same"):
        RemoteEvaluator(values, dense, run.identity)
