"""Compressed mixtures as folders: experts apart in transformers, fused again in the dense formats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_model import assert_same_logits, assert_same_tensors
from torch import nn

from compression import FactorCache, FactorStore, ScheduleApplier, collect, discover_sites, lagrangian, to_schedule
from compression.bonds import discover_bonds, with_bonds
from compression.layers.experts import experts_apart, take_apart_
from compression.layers.mpo_linear import MPOLinear
from compression.layers.skeleton import describe, put_skeleton_
from compression.schedule import ExpertForm
from compression.sites import dense_weight, model_parameters
from compression.size import SizeModel
from search.export.folder import export_dense_, export_model
from search.model.architecture import bare_model
from search.model.loading import LoadedModel, load_for_use, load_model

PROMPT = torch.arange(40).reshape(2, 20)


def compressed(name: str, form: ExpertForm) -> tuple[LoadedModel, ScheduleApplier]:
    """A tiny mixture at 0.6 of its sites' parameters, as the closed form allocates them."""
    loaded = load_model(name, "cpu")
    model = loaded.model
    take_apart_(model, form)
    sites = discover_sites(model)
    sites = with_bonds(sites, discover_bonds(model, sites))
    ids = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0))
    batches = [(ids, torch.ones_like(ids, dtype=torch.bool))]
    statistics = collect(model, sites, batches, torch.Generator().manual_seed(1))
    weights = {site.name: dense_weight(model.get_submodule(site.name)) for site in sites if not site.dense_because}
    store = FactorStore(sites, weights, lambda: statistics, "key", 0.01, FactorCache(None))
    menu = store.menu()
    schedule = to_schedule(menu, lagrangian(menu, int(0.6 * menu.dense_parameters)))
    sizes = SizeModel(model, sites)
    applier = ScheduleApplier(model, store, packed=True)
    applier.apply_(schedule)
    assert model_parameters(model) == sizes.size(schedule).parameters
    assert any(isinstance(module, MPOLinear) for each in experts_apart(model).values() for module in each.modules())
    return loaded, applier


@pytest.mark.parametrize(("name", "form"), [("random:tiny-mixtral", "single"), ("random:tiny-qwen3-moe", "shared")])
def test_a_compressed_mixture_is_loaded_saved_again_merged_and_restored(
    name: str, form: ExpertForm, tmp_path: Path
) -> None:
    loaded, applier = compressed(name, form)
    expected = loaded.model(PROMPT).logits
    export_model(loaded.model, loaded.tokenizer, tmp_path / "hf")
    found = load_for_use(str(tmp_path / "hf"), "cpu").model
    assert_same_tensors(found, loaded.model)
    assert_same_logits(found(PROMPT).logits, expected)
    found.save_pretrained(tmp_path / "again")
    loaded.tokenizer.save_pretrained(tmp_path / "again")
    assert_same_logits(load_for_use(str(tmp_path / "again"), "cpu").model(PROMPT).logits, expected)
    assert_same_logits(found.dequantize()(PROMPT).logits, expected)

    applier.restore_()
    for path, experts in experts_apart(loaded.model).items():
        loaded.model.set_submodule(path, experts.fused())
    assert_same_tensors(loaded.model, load_model(name, "cpu").model)


def test_a_compressed_mixture_is_exported_as_an_ordinary_folder_of_its_architecture(tmp_path: Path) -> None:
    loaded, _ = compressed("random:tiny-mixtral", "single")
    expected = loaded.model(PROMPT).logits
    export_dense_(loaded.model, loaded.tokenizer, tmp_path / "dense")
    dense = load_model(str(tmp_path / "dense"), "cpu").model
    assert not experts_apart(dense)
    assert_same_tensors(dense, loaded.model)
    torch.testing.assert_close(dense(PROMPT).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda modules: modules["model.layers.0.mlp.experts"].update(tensors=["x"]), "tensors must be"),
        (lambda modules: modules.update({"model.layers.0.mlp": {"kind": "experts", "tensors": []}}), "is no fused"),
        (lambda modules: modules.update({"model.layers.9": {"kind": "experts", "tensors": []}}), "compressed module"),
    ],
)
def test_a_description_that_does_not_fit_the_experts_of_the_model_is_refused(change, message: str) -> None:
    model: nn.Module = load_model("random:tiny-qwen3-moe", "cpu").model
    bare = bare_model(model)
    take_apart_(model)
    modules = describe(model)
    change(modules)
    with pytest.raises(ValueError, match=message):
        put_skeleton_(bare, modules)
