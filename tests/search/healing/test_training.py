"""Healing on tiny random models: it lowers the divergence, resumes exactly, and never leaves a model worse."""

from __future__ import annotations

import json
import math
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_healing import PLAN, heal, parameters, subject

from compression.layers.mpo_linear import MPOLinear
from compression.layers.quantize import quantize_
from compression.numerics.gauge import stored
from compression.sites import discover_sites, model_parameters
from compression.training.gates import absorb_gates_, add_gates_
from search.export.quantize import module_bits
from search.healing import training
from search.model.ends import ends
from search.runtime.checkpoints import Checkpoint, Checkpoints


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C behind a step."""
    plain = training._Healing._step

    def stepping(self: Any) -> str:
        result = plain(self)
        if self.at.step == step:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(training._Healing, "_step", stepping)


@pytest.mark.parametrize("name", ["random:tiny-llama", "random:tiny-gpt2", "random:tiny-qwen2", "random:tiny-gemma2"])
def test_healing_lowers_the_divergence_on_other_text_at_equal_size_and_leaves_the_dense_model_alone(name: str) -> None:
    dense, model, text, judge = subject(name)
    before, size = parameters(dense), model_parameters(model)
    healed, _ = heal(model, dense, text, judge)
    assert healed.measurements[-1].kl < 0.9 * healed.measurements[0].kl
    assert judge.measure(model).kl == pytest.approx(healed.measurements[-1].kl, rel=1e-4)
    assert model_parameters(model) == size
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in dense.named_parameters())


def test_an_interrupted_healing_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, model, text, judge = subject()
    whole, resumed = deepcopy(model), deepcopy(model)
    plan = replace(PLAN, tokens=1500)  # less than an epoch: then targets are not made anew in other batches
    heal(whole, dense, text, judge, plan)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 7)
        with pytest.raises(KeyboardInterrupt):
            heal(model, dense, text, judge, plan, tmp_path)
    _, told = heal(resumed, dense, text, judge, plan, tmp_path)
    assert "resumes from step 7" in told[0]
    expected = parameters(whole)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in resumed.named_parameters())


def test_the_newest_checkpoint_that_verifies_is_used_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, model, text, judge = subject()
    for step in (4, 6):
        with monkeypatch.context() as patched:
            interrupt_at(patched, step)
            with pytest.raises(KeyboardInterrupt):
                heal(deepcopy(model), dense, text, judge, folder=tmp_path)
    newest = max(tmp_path.glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-50])
    _, told = heal(model, dense, text, judge, folder=tmp_path)
    assert "cannot be used" in told[0]
    assert "resumes from step 4" in told[1]


@pytest.mark.parametrize("lost", ["optimizer/", "best/", "model/", "optimizer/model.norm.weight/columns"])
@pytest.mark.slow
def test_a_checkpoint_that_lacks_something_is_passed_over_like_a_damaged_one(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, model, text, judge = subject()
    whole, plan = deepcopy(model), replace(PLAN, tokens=1000)
    heal(whole, dense, text, judge, plan)
    for step in (2, 4):
        with monkeypatch.context() as patched:
            interrupt_at(patched, step)
            with pytest.raises(KeyboardInterrupt):
                heal(deepcopy(model), dense, text, judge, plan, tmp_path)
    newest = Checkpoints(tmp_path).newest(lambda found: found)
    assert newest is not None
    left = {name: tensor for name, tensor in newest.tensors.items() if not name.startswith(lost)}
    assert 0 < len(left) < len(newest.tensors)
    Checkpoints(tmp_path).save(replace(newest, tensors=left))
    _, told = heal(model, dense, text, judge, plan, tmp_path)
    assert re.fullmatch(rf"checkpoint step-00000004\.json cannot be used \(it has no {lost}.*\); .*", told[0])
    assert "resumes from step 2" in told[1]
    expected = parameters(whole)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())


def test_what_is_saved_after_a_checkpoint_was_passed_over_takes_its_place(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (5, 6, 2):
        checkpoints.save(Checkpoint(step, {"x": torch.ones(1)}, {}))
    assert checkpoints.newest(lambda found: found.step) == 2


def test_checkpoints_of_another_healing_are_refused(tmp_path: Path) -> None:
    dense, model, text, judge = subject()
    heal(deepcopy(model), dense, text, judge, replace(PLAN, tokens=500), tmp_path)
    with pytest.raises(ValueError, match="belong to a healing with other"):
        heal(model, dense, text, judge, replace(PLAN, tokens=500, rate=1e-3), tmp_path)


@pytest.mark.parametrize("other", ["model", "dense"])
def test_checkpoints_of_a_healing_of_another_model_are_refused(other: str, tmp_path: Path) -> None:
    dense, model, text, judge = subject()
    heal(deepcopy(model), dense, text, judge, replace(PLAN, tokens=500), tmp_path)
    {"model": model, "dense": dense}[other].model.norm.weight[3] += 1e-3
    with pytest.raises(ValueError, match="belong to a healing of another model"):
        heal(model, dense, text, judge, replace(PLAN, tokens=500), tmp_path)


def test_a_checkpoint_whose_record_was_changed_is_passed_over(tmp_path: Path) -> None:
    checkpoints, said = Checkpoints(tmp_path), []
    for step in (1, 2):
        checkpoints.save(Checkpoint(step, {"x": torch.ones(1)}, {"row": "searched", "rate": 0.1}))
    record = tmp_path / "step-00000002.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps(content | {"state": {"row": "repaired", "rate": 0.1}}))
    assert checkpoints.newest(lambda found: found.step, said.append) == 1
    assert "its record was changed" in said[0]
    del content["digest"]  # as earlier versions wrote it
    record.write_text(json.dumps(content))
    assert checkpoints.newest(lambda found: found.step) == 2


def test_numbers_that_explode_stop_healing_and_the_last_good_state_is_kept() -> None:
    dense, model, text, judge = subject()
    healed, _ = heal(model, dense, text, judge, replace(PLAN, rate=1e3))
    assert "not finite" in healed.stopped
    assert judge.measure(model).kl == pytest.approx(healed.measurements[-1].kl, rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_gives_no_numbers_from_the_start_is_left_as_it_is_and_said(value: float) -> None:
    dense, model, text, judge = subject()
    model.model.norm.weight[3] = value
    before = parameters(model)
    healed, _ = heal(model, dense, text, judge)
    assert "NaN or infinite logits" in healed.stopped
    assert (list(healed.measurements), healed.outlook()) == ([], "")
    after = parameters(model)
    assert all(torch.equal(after[name].nan_to_num(), was.nan_to_num()) for name, was in before.items())


def test_healing_that_only_hurts_leaves_the_model_as_it_was() -> None:
    dense, model, text, judge = subject()
    before = judge.measure(model).kl
    healed, _ = heal(model, dense, text, judge, replace(PLAN, rate=30.0, tokens=600))
    assert judge.measure(model).kl == pytest.approx(before, rel=1e-5)
    assert len(healed.measurements) == 1


@pytest.mark.slow
def test_gradients_are_used_at_once_or_added_up_over_passes_and_activations_computed_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense, model, text, judge = subject()
    results, held, step = [], [], training.FactoredRMSprop.step

    def counted(self: Any) -> None:
        held.append(sum(p.grad is not None for group in self.param_groups for p in group["params"]))
        step(self)

    monkeypatch.setattr(training.FactoredRMSprop, "step", counted)
    for changes in ({"pass_tokens": 160}, {"pass_tokens": 40}, {"checkpointing": True}):
        healed, _ = heal(deepcopy(model), dense, text, judge, replace(PLAN, tokens=800, **changes))
        results.append(healed.measurements[-1].kl)
    assert results[1:] == pytest.approx(results[:1] * 2, rel=1e-3)
    steps = len(held) // 3
    assert set(held[:steps]) == {0}
    assert 0 not in held[steps:]


@pytest.mark.parametrize("name", ["random:tiny-llama", "random:tiny-gpt2"])
@pytest.mark.slow
def test_gates_are_learned_and_absorbed_without_a_trace(name: str) -> None:
    dense, model, text, judge = subject(name)
    before = {path: tensor.shape for path, tensor in model.state_dict().items()}
    healed, _ = heal(model, dense, text, judge, replace(PLAN, gates=True))
    plain = heal(subject(name)[1], dense, text, judge)[0]
    assert healed.measurements[-1].kl < 0.9 * healed.measurements[0].kl
    assert healed.measurements[-1].kl != plain.measurements[-1].kl
    assert {path: tensor.shape for path, tensor in model.state_dict().items()} == before
    assert judge.measure(model).kl == pytest.approx(healed.measurements[-1].kl, rel=1e-4)


@pytest.mark.parametrize("name", ["random:tiny-llama", "random:tiny-gpt2"])
@pytest.mark.parametrize("kind", ["int4", "mixed"])
def test_a_quantized_model_learns_by_its_scales_and_keeps_its_integers(name: str, kind: str, tmp_path: Path) -> None:
    dense, model, text, judge = subject(name, 0.9)
    quantize_(model, module_bits(model, discover_sites(dense), kind), lambda name: None)
    state = {key: values.clone() for key, values in model.state_dict().items()}
    fixed = tuple(f"{name}." for name in ends(dense))
    plan = replace(PLAN, scale_rate=1e-2)
    healed, _ = heal(model, dense, text, judge, plan, tmp_path)
    assert healed.measurements[-1].kl < 0.9 * healed.measurements[0].kl
    assert judge.measure(model).kl == pytest.approx(healed.measurements[-1].kl, rel=1e-2)  # scales are 16-bit numbers
    after = model.state_dict()
    assert {key: values.shape for key, values in after.items()} == {key: values.shape for key, values in state.items()}
    for key, values in after.items():
        trained = not key.endswith("codes") and not key.startswith(fixed)
        assert values.dtype == state[key].dtype
        assert trained or torch.equal(values, state[key]), key
    scales = [key for key in after if key.endswith(".scales") and not key.startswith(fixed)]
    assert (len(scales) > 0) == (kind == "int4")
    assert not [key for key in scales if torch.equal(after[key], state[key])]


def test_a_gate_of_a_true_mpo_is_a_factor_per_leg_and_goes_into_its_cores() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 3, 4, 5), (5, 2, 3, 2), (2, 4, 1, 1)]
    cores = [torch.randn(shape, generator=generator) for shape in shapes]
    for pivoted in (False, True):
        model = torch.nn.Sequential(MPOLinear(stored(cores, pivoted), torch.randn(24, generator=generator)))
        add_gates_(model)
        with torch.no_grad():
            for name, parameter in model[0].named_parameters():
                if name.startswith("gate_"):
                    parameter += torch.randn(parameter.shape, generator=generator)
        inputs = torch.randn(7, 12, generator=generator)
        gated = model(inputs)
        absorb_gates_(model)
        assert not [name for name, _ in model.named_parameters() if "gate" in name]
        torch.testing.assert_close(model(inputs), gated, rtol=1e-4, atol=1e-4)


def test_labels_teach_the_text_itself_where_it_is_wanted() -> None:
    dense, model, text, judge = subject()
    healed, _ = heal(model, dense, text, judge, replace(PLAN, loss="labels", rate=5e-3))
    assert healed.measurements[-1].perplexity < 0.9 * healed.measurements[0].perplexity


@pytest.mark.slow
def test_hidden_states_may_be_matched_too_and_the_vocabulary_sampled() -> None:
    dense, model, text, judge = subject()
    for changes in ({"hidden_weight": 0.5}, {"targets": 8, "sample": 40}):
        healed, _ = heal(deepcopy(model), dense, text, judge, replace(PLAN, **changes))
        assert healed.measurements[-1].kl < 0.93 * healed.measurements[0].kl


def test_a_model_in_half_precision_is_given_back_in_it() -> None:
    dense, model, text, judge = subject()
    dense, model = dense.bfloat16(), model.bfloat16()
    judge.reference(dense)
    healed, _ = heal(model, dense, text, judge, replace(PLAN, tokens=1500))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert healed.measurements[-1].kl < healed.measurements[0].kl


def test_a_dense_model_is_refused() -> None:
    dense, _, text, judge = subject()
    with pytest.raises(ValueError, match="no matrix of this one is compressed"):
        heal(deepcopy(dense), dense, text, judge)


def test_passes_become_smaller_when_memory_runs_out_and_the_result_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for limit in (160, 40):
        dense, model, text, judge = subject()
        plain = training._Healing._loss

        def loss(self: Any, rows: Any, salt: int, limit: int = limit, plain: Any = plain) -> torch.Tensor:
            if len(rows) * self.teacher.text.tokens.shape[1] > limit:
                raise torch.OutOfMemoryError("no memory left")
            return plain(self, rows, salt)

        monkeypatch.setattr(training._Healing, "_loss", loss)
        plan = replace(PLAN, tokens=800, pass_tokens=640, sample=0)
        _, told = heal(model, dense, text, judge, plan)
        monkeypatch.undo()
        results.append((parameters(model), told))
    (wanted, nothing), (found, told) = results
    assert not nothing
    assert [line.split("; ")[1] for line in told] == [
        f"training continues with passes of {size} tokens" for size in (80, 40)
    ]
    for name, values in wanted.items():
        torch.testing.assert_close(found[name], values, rtol=1e-3, atol=1e-5)
