"""A model that would not fit into memory is mapped from disk, and is the same model to the last bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_data import fake_data
from small_run import words

from search import cli
from search.experiment import preparation
from search.experiment.preparation import stays_on_disk
from search.model import loading, mapped
from search.model.loading import load_model

__all__ = ["fake_data"]

Save = Callable[..., Path]


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Save:
    """Writes a tiny model of a dtype into a folder, in files of a size."""
    monkeypatch.setenv("CHISEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mapped, "_LEAST", 1)

    def save(
        dtype: torch.dtype = torch.float32, size: str = "5GB", change: Callable[[Any], None] | None = None
    ) -> Path:
        loaded = load_model("random:tiny-llama", "cpu")
        model = loaded.model.to(dtype)
        if change is not None:
            change(model)
        model.save_pretrained(tmp_path / "model", max_shard_size=size)
        loaded.tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def both(name: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The model as it is loaded with memory for it, and without."""
    monkeypatch.setattr(mapped, "available_memory", lambda: 1 << 40)
    plain = load_model(str(name), "cpu", dtype)
    monkeypatch.setattr(mapped, "available_memory", lambda: 1000)
    return plain, load_model(str(name), "cpu", dtype)


@pytest.mark.parametrize("size", ["5GB", "100KB"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mapped_model_is_the_loaded_one(
    stored: torch.dtype, dtype: torch.dtype, size: str, saved: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = saved(stored, size, lambda model: setattr(model.generation_config, "max_length", 77))
    plain, found = both(name, dtype, monkeypatch)
    assert (plain.is_mapped, found.is_mapped) == (False, True)
    assert found.identity == plain.identity
    assert found.model.config.to_dict() == plain.model.config.to_dict()
    assert found.model.generation_config.to_dict() == plain.model.generation_config.to_dict()
    assert not any(parameter.requires_grad for parameter in found.model.parameters())
    ids = torch.arange(20)[None]
    assert torch.equal(found.model(ids).logits, plain.model(ids).logits)
    assert found.encode("Question: why?") == plain.encode("Question: why?")


def test_weights_are_read_from_the_files_and_converted_once(saved: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    name = saved(torch.bfloat16)
    monkeypatch.setattr(mapped, "available_memory", lambda: 1000)

    def read(*arguments: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading, "read_pretrained", read)
    assert load_model(str(name), "cpu", torch.bfloat16).is_mapped
    converted = name.parent / "cache" / "models"
    assert not converted.exists()  # these are mapped as they are
    first = load_model(str(name), "cpu", torch.float32)
    [folder] = (path for path in converted.iterdir() if path.is_dir())
    monkeypatch.setattr(mapped, "_groups", read)
    assert load_model(str(name), "cpu", torch.float32).digest == first.digest
    monkeypatch.undo()
    monkeypatch.setenv("CHISEL_CACHE", str(name.parent / "cache"))
    monkeypatch.setattr(mapped, "_LEAST", 1)
    monkeypatch.setattr(mapped, "available_memory", lambda: 1000)
    part = min(folder.glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1] + b"\0")
    assert load_model(str(name), "cpu", torch.float32).digest == first.digest  # a damaged copy is made again


def test_what_is_not_stored_as_the_model_names_it_is_loaded_as_before(
    saved: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    name = saved()
    file = name / "model.safetensors"
    tensors = {key.removeprefix("model."): values for key, values in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    plain, found = both(name, torch.float32, monkeypatch)
    assert not found.is_mapped
    assert found.digest == plain.digest


def test_a_line_says_that_weights_stay_on_disk_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = None
    for is_mapped, memory, said in ((True, 3 * 10**9, True), (True, 5 * 10**9, False), (False, 3 * 10**9, False)):
        monkeypatch.setattr(preparation, "available_memory", lambda memory=memory: memory)
        monkeypatch.setattr(preparation, "model_bytes", lambda model: 4 * 10**9)
        line = stays_on_disk(SimpleNamespace(model=model, is_mapped=is_mapped))  # type: ignore[arg-type]
        assert bool(line) is said
        if said:
            assert line == (
                "the model takes 4.0 GB and 3.0 GB of memory are available: its weights stay on disk and are read "
                "block by block, which takes longer"
            )


@pytest.mark.slow
@pytest.mark.usefixtures("fake_data")
def test_a_run_of_a_model_on_disk_ends_with_the_same_table(
    saved: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = {}
    for name, memory in (("whole", 1 << 40), ("mapped", 1000)):
        monkeypatch.setattr(mapped, "available_memory", lambda memory=memory: memory)
        monkeypatch.setattr(preparation, "available_memory", lambda memory=memory: memory)
        monkeypatch.setenv("CHISEL_CACHE", str(tmp_path / "cache" / name))
        model = saved(torch.bfloat16, "100KB")
        flags = words(out=tmp_path / name, model=model, budget=2, repair_tokens=512)
        assert cli.main([flag for flag in flags if flag != "--quiet"]) == cli.DONE
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        tables[name] = [(row["schedule"], row["kl"], row["parameters"]) for row in summary["rows"]]
        assert ("its weights stay on disk" in capsys.readouterr().err) is (name == "mapped")
    assert tables["mapped"] == tables["whole"]
    assert len(tables["whole"]) > 3
