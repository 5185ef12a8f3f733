"""Image-text models: the language part is compressed, the vision tower stays whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from image_text import SHAPES, image_text_folder
from tiny_model import assert_same_logits, tensorized

from compression.sites import discover_sites, model_parameters
from search.export.folder import export_dense_, export_model
from search.model.loading import load_for_use, load_model

IDS = torch.arange(40).reshape(2, 20)


@pytest.fixture(scope="module", params=sorted(SHAPES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_text_folder(tmp_path_factory.mktemp("models") / request.param, request.param)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


def tower(model: Any) -> dict[str, torch.Tensor]:
    """What is stored outside the language part."""
    return {name: values for name, values in model.state_dict().items() if "language_model" not in name}


def test_the_whole_model_is_loaded_and_only_its_language_part_has_sites(folder: Path) -> None:
    original = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    found = load_model(str(folder), "cpu").model
    assert type(found) is type(original)
    assert model_parameters(found) == model_parameters(original)
    assert_same_logits(logits(found), logits(original))
    sites = discover_sites(found)
    assert {site.block for site in sites} == {0, 1}
    assert all(".language_model.layers." in site.name for site in sites)
    language = sum(site.parameters for site in sites)
    assert sum(values.numel() for values in tower(found).values()) > 2 * language


@pytest.mark.parametrize("form", ["hf", "dense"])
def test_an_export_is_of_the_original_class_with_the_tower_as_it_was(folder: Path, form: str, tmp_path: Path) -> None:
    loaded = tensorized(str(folder))
    expected, whole = logits(loaded.model), tower(load_model(str(folder), "cpu").model)
    export = {"hf": export_model, "dense": export_dense_}[form]
    export(loaded.model, loaded.tokenizer, tmp_path / "out")
    read = load_for_use(str(tmp_path / "out"), "cpu").model
    assert type(read) is type(loaded.model)
    assert (logits(read) - expected).abs().max() < 1e-3 * expected.abs().max()
    found = tower(read)
    assert all(torch.equal(values, found[name]) for name, values in whole.items())
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == {"do_resize": True}


@pytest.mark.slow
def test_a_compressed_folder_loads_where_this_project_is_not_installed(tmp_path: Path) -> None:
    loaded = tensorized(str(image_text_folder(tmp_path / "model", "gemma3")))
    expected = logits(loaded.model)
    export_model(loaded.model, loaded.tokenizer, tmp_path / "out")
    done = subprocess.run([sys.executable, "-c", _ELSEWHERE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["class"] == type(loaded.model).__name__
    assert_same_logits(torch.tensor(said["logits"]), expected[0, -1])


_ELSEWHERE = """
import json, sys, torch, transformers
model = transformers.AutoModelForImageTextToText.from_pretrained("out", trust_remote_code=True)
assert not any(name.split(".")[0] in ("search", "compression") for name in sys.modules)
with torch.no_grad():
    logits = model(input_ids=torch.arange(40).reshape(2, 20)).logits
print(json.dumps({"class": type(model).__mro__[1].__name__, "logits": logits[0, -1].tolist()}))
"""
