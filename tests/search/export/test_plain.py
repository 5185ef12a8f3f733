"""Folders and GGUF files for other programs, from a model in memory and from a run."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from cut_model import Cut, cut_model
from fake_data import fake_data  # noqa: F401 (a fixture)
from merging_tokenizer import merging_tokenizer
from model_folder import model_folder
from small_run import words
from tiny_model import assert_same_logits, tensorized
from transformers import AutoModelForCausalLM

from compression.bonds import cut as cut_out
from compression.bonds import discover_bonds
from compression.layers.experts import take_apart_
from compression.schedule import DENSE, Schedule
from compression.sites import Unit, discover_sites, units
from search import cli
from search.export import folder as folders
from search.export.folder import export_gguf, export_plain, footprint
from search.export.gguf_file import read_values
from search.export.plain import plain_model
from search.export.restore import restore
from search.model.loading import load_model
from search.priors.format import Prior
from search.runtime.console import Console

PROMPT = torch.arange(40).reshape(2, 20)
MODELS = ("random:tiny-llama", "random:tiny-qwen2", "random:tiny-gpt2")


@torch.no_grad()
def logits(model):
    return model(PROMPT, attention_mask=torch.ones_like(PROMPT)).logits


def applied(name="random:tiny-llama", blocks=(0, 1, 2)):
    """A model whose bonds are cut to half in some of its three blocks."""
    cut = cut_model(name)
    kept = {site.name for unit in units(cut.store.sites) for site in _sites(unit) if site.block in blocks}
    schedule = Schedule(tuple((name, choice if name in kept else DENSE) for name, choice in cut.schedule))
    cut = Cut(cut.loaded, cut.store, schedule)
    cut.apply()
    return cut.loaded


def _sites(unit):
    return unit.sites if isinstance(unit, Unit) else [unit]


@pytest.mark.parametrize("name", MODELS)
def test_alike_blocks_are_an_ordinary_smaller_model(name, tmp_path):
    loaded = applied(name)
    expected, before = logits(loaded.model), loaded.model.config.to_dict()
    export_plain(loaded.model, loaded.tokenizer, tmp_path / "plain", "the card")
    assert loaded.model.config.to_dict() == before
    assert {file.suffix for file in (tmp_path / "plain").iterdir()} == {".json", ".safetensors", ".md"}
    stated = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "auto_map" not in stated
    assert "quantization_config" not in stated
    assert stated.get("intermediate_size", stated.get("n_inner")) == 24
    assert stated.get("num_key_value_heads", 1) == 1
    small = load_model(str(tmp_path / "plain"), "cpu").model
    assert type(small) is type(load_model(name, "cpu").model)
    assert_same_logits(logits(small), expected)
    assert footprint(small).stored < footprint(load_model(name, "cpu").model).stored


def test_half_precision_stays_half_precision(tmp_path):
    loaded = applied()
    export_plain(loaded.model.to(torch.bfloat16), loaded.tokenizer, tmp_path / "plain")
    stated = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert stated["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: applied("random:tiny-gpt2", blocks=(1,)), r"different widths .*GPT2LMHeadModel is none; use .*hf"),
        (lambda: applied(blocks=()), "no hidden unit and no head was removed.* --format dense"),
        (tensorized, "is factored or stacked.*search with --form plain and .*, or export with --format hf"),
    ],
)
def test_models_without_settings_of_their_own_are_refused_and_nothing_is_written(make, message, tmp_path):
    loaded = make()
    with pytest.raises(ValueError, match=message) as refused:
        export_plain(loaded.model, loaded.tokenizer, tmp_path / "plain")
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_written_wrongly_does_not_appear(tmp_path, monkeypatch):
    loaded, save = applied(), folders._save

    def wrong(model, *more):
        model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight + 1, requires_grad=False)
        save(model, *more)
        model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight - 1, requires_grad=False)

    monkeypatch.setattr(folders, "_save", wrong)
    with pytest.raises(ValueError, match=r"was written wrongly: model\.norm\.weight"):
        export_plain(loaded.model, loaded.tokenizer, tmp_path / "plain")
    assert list(tmp_path.iterdir()) == []


def test_a_gguf_folder_is_whole_or_absent(tmp_path):
    loaded = replace(applied(), tokenizer=merging_tokenizer())
    export_gguf(loaded.model, loaded.tokenizer, tmp_path / "gguf", "float16", lambda file: f"{file.stat().st_size}")
    size = (tmp_path / "gguf" / "model.gguf").stat().st_size
    assert (tmp_path / "gguf" / "README.md").read_text() == str(size)
    torch.testing.assert_close(
        logits(load_model(str(tmp_path / "gguf"), "cpu").model), logits(loaded.model), rtol=0.1, atol=0.1
    )

    def fail(file):
        raise RuntimeError("no card")

    with pytest.raises(RuntimeError, match="no card"):
        export_gguf(loaded.model, loaded.tokenizer, tmp_path / "other", "float16", fail)
    assert [each.name for each in tmp_path.iterdir()] == ["gguf"]


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_a_run_with_blocks_alike_is_exported_without_code_and_for_llama_cpp_as_the_file_holds_it(tmp_path, capsys):
    model = model_folder(tmp_path / "model", blocks=1)  # which is like all others
    run, quiet = tmp_path / "run", Console(quiet=True)

    def done(*given, code=cli.DONE):
        capsys.readouterr()
        assert cli.main([str(word) for word in given]) == code
        return capsys.readouterr()

    done(*words(out=run, budget=2, form="plain", model=model, target_kept=0.5))
    done("export", run, "--quiet", "--device", "cpu", "--dtype", "float32", "--out", tmp_path / "hf")
    assert not list((tmp_path / "hf").glob("*.py"))
    assert "an ordinary one of the original's architecture" in (tmp_path / "hf" / "README.md").read_text()
    ordinary = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=False)
    assert type(ordinary).__module__.startswith("transformers.models.")
    error = done("heal", tmp_path / "hf", "--model", model, "--quiet", code=cli.REFUSED).err
    assert "describes a model, not a run: give the folder of a run" in error
    expected = restore(run, quiet, "cpu", "searched").experiment.loaded.model
    command = ["export", run, "--quiet", "--device", "cpu", "--format", "gguf"]
    said = done(*command, "--dtype", "float32", "--out", tmp_path / "whole").out
    assert f"llama-server -m {tmp_path / 'whole'}/model.gguf" in said
    assert_same_logits(logits(ordinary), logits(expected))
    read = read_values(expected, tmp_path / "whole" / "model.gguf")
    assert read.keys() == dict(expected.named_parameters()).keys()
    assert all(torch.equal(values, expected.get_parameter(name)) for name, values in read.items())
    done(*command, "--quantize", "q8_0", "--out", tmp_path / "eight")
    card = (tmp_path / "eight" / "README.md").read_text()
    assert "llama-server -m model.gguf" in card
    assert "searched, q8" in card
    assert (tmp_path / "eight" / "model.gguf").stat().st_size < (tmp_path / "whole" / "model.gguf").stat().st_size

    shutil.rmtree(run)
    done(*words(out=run, budget=2, form="factors", model=model, target_kept=0.5))
    assert not all(choice.is_plain for _, choice in Prior.read(run / "prior.json").schedule)
    for form in ("gguf", "plain"):
        error = done("export", run, "--quiet", "--format", form, "--out", tmp_path / form, code=cli.REFUSED).err
        assert "search with --form plain, or export with --format hf" in error
        assert error.count("\n") == 1
        assert not (tmp_path / form).exists()


def test_a_mixture_whose_experts_are_equally_narrow_is_a_smaller_mixture(tmp_path):
    loaded = load_model("random:tiny-mixtral", "cpu")
    model = loaded.model
    take_apart_(model)
    sites = discover_sites(model)
    for bond in discover_bonds(model, sites):
        if bond.kind == "hidden":
            kept = torch.arange(0, bond.groups, 3)
            for name in bond.sites:
                places = bond.rows_of(name, kept), bond.columns_of(name, kept)
                model.set_submodule(name, cut_out(model.get_submodule(name), *places))
    expected = model(PROMPT).logits
    export_plain(model, loaded.tokenizer, tmp_path / "plain")
    small = load_model(str(tmp_path / "plain"), "cpu").model
    assert small.config.intermediate_size == 16
    torch.testing.assert_close(small(PROMPT).logits, expected, rtol=1e-4, atol=1e-5)
    name = "model.layers.1.mlp.experts.2.down_proj"
    model.set_submodule(name, cut_out(model.get_submodule(name), None, torch.arange(9)))
    with pytest.raises(ValueError, match=r"different widths \(experts.down_proj has 9 to 16 inputs\)"):
        plain_model(model)
