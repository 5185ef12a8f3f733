"""Healing of models with fewer hidden units and heads: it trains what is left, resumes, and its weights load."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_model import FORMS, Cut, cut_model
from safetensors.torch import load_file, save_file
from tiny_healing import PLAN, heal, parameters, subject

from compression.layers.kept import kept
from compression.layers.mpo_linear import MPOLinear
from compression.schedule import DENSE, Choice, Schedule
from compression.sites import model_parameters
from compression.training.trainable import trainable_
from search.healing import training
from search.healing.state import StoredWeights, load_sites_, site_tensors, write_weights
from search.model.loading import load_model
from search.runtime.files import file_digest

IDS = torch.arange(40).reshape(2, 20)


def compressed(name: str = "random:tiny-llama", form: str = "plain") -> tuple[Cut, Any, Any]:
    """A cut, its dense model, and the model that it makes of it."""
    cut = cut_model(name, form)
    dense = deepcopy(cut.loaded.model)
    cut.apply()
    return cut, dense, cut.loaded.model


def learned(dense: Any) -> Any:
    """Text to learn from and to judge by, which the dense model finds likely."""
    _, _, text, judge = subject()
    judge.reference(dense)
    return text, judge


@pytest.mark.parametrize("form", FORMS)
def test_healing_trains_what_is_left_and_nothing_that_was_never_cut(form: str) -> None:
    cut, dense, model = compressed(form=form)
    text, judge = learned(dense)
    before, size = parameters(model), model_parameters(model)
    healed, _ = heal(model, dense, text, judge)
    assert healed.measurements[-1].kl < 0.98 * healed.measurements[0].kl
    assert judge.measure(model).kl == pytest.approx(healed.measurements[-1].kl, rel=1e-4)
    assert model_parameters(model) == size
    changed = {name for name, values in model.named_parameters() if not torch.equal(values, before[name])}
    for name, choice in cut.schedule:
        layer = model.get_submodule(name)
        own = {f"{name}.{each}" for each, values in layer.named_parameters() if values.numel()}
        assert own <= changed if choice.widths else not own & changed, name
        assert bool(kept(layer)) == bool(choice.widths)


@pytest.mark.parametrize("form", ["plain", "empty"])
def test_an_interrupted_healing_of_a_cut_model_goes_on_to_the_same_weights(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, dense, model = compressed(form=form)
    text, judge = learned(dense)
    whole, resumed, plan = deepcopy(model), deepcopy(model), replace(PLAN, tokens=1000)
    heal(whole, dense, text, judge, plan)
    plain = training._Healing._step

    def stepping(self: Any) -> str:
        result = plain(self)
        if self.at.step == 3:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patched:
        patched.setattr(training._Healing, "_step", stepping)
        with pytest.raises(KeyboardInterrupt):
            heal(model, dense, text, judge, plan, tmp_path)
    _, told = heal(resumed, dense, text, judge, plan, tmp_path)
    assert "resumes from step 3" in told[0]
    expected = parameters(whole)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in resumed.named_parameters())


def test_gates_of_cut_layers_are_absorbed_and_the_row_numbers_stay() -> None:
    _, dense, model = compressed(form="factors")
    text, judge = learned(dense)
    before = {name: values.shape for name, values in model.state_dict().items()}
    heal(model, dense, text, judge, replace(PLAN, gates=True, tokens=600))
    assert {name: values.shape for name, values in model.state_dict().items()} == before
    assert any(isinstance(module, MPOLinear) and kept(module) for module in model.modules())


def test_a_matrix_that_only_lost_rows_is_something_to_heal() -> None:
    _, dense, model = compressed()
    assert not any(isinstance(module, MPOLinear) for module in model.modules())
    names = trainable_(model)
    assert "model.layers.1.mlp.gate_proj.weight" in names
    with pytest.raises(ValueError, match="no matrix of this one is compressed"):
        trainable_(dense)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["random:tiny-llama", "random:tiny-qwen2", "random:tiny-gpt2"])
def test_stored_weights_of_a_cut_model_go_into_a_dense_one_and_out_again(name: str, form: str, tmp_path: Path) -> None:
    cut, dense, model = compressed(name, form)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    write_weights(tmp_path, "healing.json", model, cut.store.sites, _document(cut.schedule))
    assert json.loads((tmp_path / "healing.json").read_text())["version"] == 4
    stored, fresh = StoredWeights.read(tmp_path), load_model(name, "cpu").model
    for parameter, other in zip(fresh.parameters(), dense.parameters(), strict=True):
        parameter.copy_(other + 0.01 if parameter.ndim == 2 else other)  # what is not stored, such as embeddings
    before, modules = parameters(fresh), dict(fresh.named_modules())
    undo = stored.put_(fresh, cut.store.sites, cut.schedule)
    for site in cut.store.sites:
        assert kept(fresh.get_submodule(site.name)).keys() == kept(model.get_submodule(site.name)).keys()
    assert model_parameters(fresh) == model_parameters(model)
    torch.testing.assert_close(fresh(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    undo()
    assert all(module is modules[path] for path, module in fresh.named_modules())
    assert all(torch.equal(parameter, before[path]) for path, parameter in fresh.named_parameters())


def _document(schedule: Schedule) -> dict[str, Any]:
    return {"model": {"id": "tiny", "digest": "x"}, "schedule": json.loads(schedule.to_json())}


def changed(schedule: Schedule, name: str, choice: Choice) -> Schedule:
    return Schedule(tuple((each, choice if each == name else old) for each, old in schedule))


GATE = "model.layers.1.mlp.gate_proj"


@pytest.mark.parametrize(
    ("choice", "tensor", "message"),
    [
        (
            Choice("dense", 0, "none", (20,)),
            None,
            rf"stored tensors do not fit {GATE} as dense of 20 × 32 .*\[24, 32\]",
        ),
        (DENSE, None, f"stored tensors do not fit {GATE} as dense of 48 × 32 .*kept_rows"),
        (Choice("dense", 0, "none", (49,)), None, "must be between 0 and 48, got 49"),
        (None, torch.arange(24) + 30, f"do not fit {GATE} as .*kept_rows must be ascending numbers from 0 to 47"),
        (None, torch.arange(20), f"stored tensors do not fit {GATE} as dense of 24 × 32"),
    ],
)
def test_stored_weights_of_another_shape_are_refused_in_one_line(
    choice: Choice | None, tensor: torch.Tensor | None, message: str
) -> None:
    cut, dense, model = compressed()
    tensors, schedule = site_tensors(model, cut.store.sites), cut.schedule
    if tensor is not None:
        tensors[f"{GATE}.kept_rows"] = tensor.int()
    if choice is not None:
        schedule = changed(schedule, GATE, choice)
    before = dict(dense.named_modules())
    with pytest.raises(ValueError, match=message) as refused:
        load_sites_(dense, cut.store.sites, schedule, tensors)
    assert "\n" not in str(refused.value)
    assert all(module is before[name] for name, module in dense.named_modules())


@pytest.mark.parametrize("form", ["plain", "factors"])
def test_a_bias_of_the_whole_matrix_does_not_fit_a_cut_one(form: str) -> None:
    cut, dense, model = compressed("random:tiny-qwen2", form)
    tensors, name = site_tensors(model, cut.store.sites), "model.layers.1.self_attn.k_proj"
    tensors[f"{name}.bias"] = torch.zeros(16)
    with pytest.raises(ValueError, match=f"stored tensors do not fit {name} as .* of 8 × 32 "):
        load_sites_(dense, cut.store.sites, cut.schedule, tensors)


def test_healed_weights_of_version_1_and_intact_ones_load_and_damaged_ones_do_not(tmp_path: Path) -> None:
    cut, _, model = compressed()
    write_weights(tmp_path, "healing.json", model, cut.store.sites, _document(cut.schedule))
    document = json.loads((tmp_path / "healing.json").read_text())
    del document["digest"]
    (tmp_path / "healing.json").write_text(json.dumps(document | {"version": 1}))
    StoredWeights.read(tmp_path).check(cut.schedule, "x")
    weights = tmp_path / "weights.safetensors"
    tensors = load_file(weights)
    tensors[f"{GATE}.kept_rows"] = tensors[f"{GATE}.kept_rows"].flip(0).contiguous()
    save_file(tensors, weights)
    assert file_digest(weights) != document["sha256"]
    with pytest.raises(ValueError, match=r"the checksum of weights\.safetensors differs"):
        StoredWeights.read(tmp_path)
