"""A folder gets its name only after it was loaded as its receiver loads it, with the logits of the model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import search.hf  # noqa: F401 (compressed folders load)
from benchmarks.zoo_models import make_model
from compression.layers.mpo_linear import MPOLinear
from compression.numerics.cores import decompose, truncate
from compression.numerics.gauge import stored
from compression.numerics.legs import resolve
from compression.refusal import Refusal
from compression.sites import dense_weight, discover_sites
from search.export import loaded_again, standalone
from search.export.folder import export_dense_, export_model
from search.export.loaded_again import rounded_once_more
from search.model.random_models import byte_tokenizer

IDS = torch.arange(24)[None]


def compressed(name: str) -> Any:
    """A model of the zoo whose first block is of low rank."""
    model = make_model(name)
    for site in discover_sites(model):
        if not site.block and not site.dense_because:
            old = model.get_submodule(site.name)
            cores, _ = decompose(dense_weight(old), resolve("lowrank", site.out_features, site.in_features))
            model.set_submodule(site.name, MPOLinear(stored(truncate(cores, 6), False), old.bias))
    return model


# transformers renames tensors of the first and splits those of the second; the third has an infinite setting.
@pytest.mark.parametrize("name", ["gpt_neox", "qwen3_moe", "falcon_h1"])
def test_a_folder_and_one_saved_from_it_give_the_logits_of_the_model(name: str, tmp_path: Path) -> None:
    model = compressed(name)
    expected = model(input_ids=IDS).logits
    export_model(model, byte_tokenizer(), tmp_path / "one")
    for folder, after in (("one", "two"), ("two", "three")):
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(found(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
        found.save_pretrained(tmp_path / after)


def test_the_dense_folder_of_a_model_with_renamed_tensors_has_its_logits(tmp_path: Path) -> None:
    model = compressed("gpt_neox")
    expected = model(input_ids=IDS).logits
    export_dense_(model, byte_tokenizer(), tmp_path / "dense")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(found(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_folder_that_gives_other_logits_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its method, transformers leaves a buffer of Falcon-H1 uninitialized in the code beside the weights."""
    monkeypatch.setattr(standalone, "_TAIL", standalone._TAIL.partition("    @classmethod")[0])
    model = compressed("falcon_h1")
    for layer in model.model.layers:
        layer.mamba.mup_vector.fill_(3.0)  # whatever memory holds, it is not this
    with pytest.raises(Refusal, match="is not written, because the model that is loaded from it gives other logits"):
        export_model(model, byte_tokenizer(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share, refused", [(0.5, False), (1.0, False), (8.0, True)])
def test_in_16_bits_as_much_may_differ_as_rounding_does(
    share: float, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, a model of 1.5 billion parameters was refused: the orders of computation were 0.04 apart."""
    model = compressed("llama").to(torch.bfloat16)
    ids = torch.arange(32)[None] % model.config.vocab_size
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0].float()
    noise = rounded_once_more(model, ids) - expected
    assert 0 < float(noise.abs().mean()) < 0.05 * float(expected.std())

    class Other:
        device = torch.device("cpu")

        def to(self, device: object) -> Other:
            return self

        def eval(self) -> Other:
            return self

        def __call__(self, **given: object) -> object:
            return SimpleNamespace(logits=(expected + share * noise)[None])

    monkeypatch.setattr(loaded_again, "tolerance", lambda dtype: 1e-9)
    monkeypatch.setattr(loaded_again, "_compressed", lambda model, written: Other())
    if refused:
        with pytest.raises(Refusal, match="gives other logits"):
            export_model(model, byte_tokenizer(), tmp_path / "out")
    else:
        export_model(model, byte_tokenizer(), tmp_path / "out")
    assert (tmp_path / "out").exists() != refused


def test_a_model_without_finite_logits_is_not_written(tmp_path: Path) -> None:
    model = compressed("llama")
    model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(Refusal, match=r"NaN or infinite logits in float32"):
        export_model(model, byte_tokenizer(), tmp_path / "out")
    assert not list(tmp_path.iterdir())
