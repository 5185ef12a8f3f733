"""Repair of cut bonds: less error also on other text, a least-squares solution, width 0, restored bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_bonds import Subject, text
from torch import nn
from torch.nn import functional

from compression import ScheduleApplier
from compression.calibration.blocks import Batch
from compression.decomposition import correction
from compression.layers.mpo_linear import MPOLinear
from compression.schedule import DENSE, Schedule
from compression.sites import dense_weight, model_parameters, put_modules
from compression.size import SizeModel

MODELS = ("random:tiny-llama", "random:tiny-qwen2", "random:tiny-gpt2", "random:tiny-gemma2")


@pytest.mark.parametrize("name", MODELS[:3])
@pytest.mark.parametrize("chi", [0, 5])
def test_repair_lowers_the_divergence_at_reduced_widths_also_on_text_it_did_not_see(name: str, chi: int) -> None:
    subject = Subject.of(name)
    model, schedule = subject.model, subject.schedule(0.5, chi)
    counted = SizeModel(model, subject.sites).size(schedule).parameters
    for batches, most in ((subject.batches, 0.9), (text(7), 0.95)):
        dense = subject.logits(batches)

        def divergence(batches: list[Batch] = batches, dense: torch.Tensor = dense) -> float:
            found = subject.logits(batches)
            return float(functional.kl_div(found, dense, log_target=True, reduction="none").sum(-1).mean())

        with ScheduleApplier(model, subject.store, packed=True) as applier:
            applier.apply_(schedule)
            decomposed = divergence()
        taken = subject.repair_(schedule)
        repaired = divergence()
        assert model_parameters(model) == counted
        put_modules(model, taken)
        assert repaired < most * decomposed


def inputs_of(model: nn.Module, names: list[str], batches: list[Batch]) -> list[torch.Tensor]:
    """The inputs of some modules, (tokens, in) each, float64."""
    caught: list[list[torch.Tensor]] = [[] for _ in names]
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, into=into: into.append(args[0]))
        for name, into in zip(names, caught, strict=True)
    ]
    with torch.no_grad():
        for ids, _ in batches:
            model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return [torch.cat(each).flatten(0, 1).double() for each in caught]


@pytest.mark.parametrize("name, at_stream", [(MODELS[0], True), (MODELS[2], True), (MODELS[3], False)])
def test_a_reader_moves_from_its_refit_straight_towards_the_least_squares_solution(
    name: str, at_stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correction, "_RIDGES", (1e-9,))
    subject = Subject.of(name)
    model, schedule = subject.model, subject.schedule(0.5)
    reader = next(
        site
        for site in subject.sites
        if site.block == 1 and site.cuts and not site.cuts[0].of_rows and site.cuts[0].groups > 2
    )
    blocks = reader.name.split(".1.")[0]
    refit = subject.store.bonds.plain(reader.name, schedule[reader.name].widths).double()
    bias = model.get_submodule(reader.name).bias
    shift = 0 if bias is None else bias.double()
    if at_stream:  # the stream after the block, less the stream that the repaired block makes without the reader
        [target] = inputs_of(model, [f"{blocks}.2"], subject.batches)
    else:
        [dense] = inputs_of(model, [reader.name], subject.batches)
        target = dense @ dense_weight(model.get_submodule(reader.name)).double().T
    subject.repair_(schedule)
    layer = model.get_submodule(reader.name)
    assert isinstance(layer, nn.Linear)
    found = layer.weight.double()
    seen, after = inputs_of(model, [reader.name, f"{blocks}.2"], subject.batches)
    if at_stream:
        target = target - (after - seen @ found.T - shift) - shift
    solution = torch.linalg.lstsq(seen, target).solution.T
    step, whole = found - refit, solution - refit
    share = float((step * whole).sum() / whole.square().sum())
    assert 0.1 < share <= 1  # less than 1, because half of the sequences must profit from the other half
    assert torch.linalg.norm(step - share * whole) < 1e-3 * torch.linalg.norm(whole)


@pytest.mark.parametrize("name", MODELS)
def test_writers_and_readers_have_the_parts_that_the_store_keeps(name: str) -> None:
    subject = Subject.of(name)
    schedule = subject.schedule(0.5)
    dense = {site.name: subject.model.get_submodule(site.name) for site in subject.sites}
    subject.repair_(schedule, correct=False)
    for site in subject.sites:
        if not site.cuts:
            continue
        layer, widths = subject.model.get_submodule(site.name), schedule[site.name].widths
        assert (layer.out_features, layer.in_features) == site.shape(widths)
        torch.testing.assert_close(layer.weight, subject.store.bonds.plain(site.name, widths), rtol=1e-4, atol=1e-6)
        if layer.bias is not None:
            rows = subject.store.bonds.kept(site.name, widths)[0]
            whole = dense[site.name].bias
            assert torch.equal(layer.bias, whole if rows is None else whole[rows])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("correct", [True, False])
def test_width_0_leaves_the_bias_of_the_reader_and_the_dense_model_comes_back(name: str, correct: bool) -> None:
    subject = Subject.of(name)
    model = subject.model
    ids, before = subject.batches[0][0], copy.deepcopy(model.state_dict())
    dense = model(input_ids=ids).logits
    taken = subject.repair_(subject.schedule(0, heads=False), correct)
    for site in subject.sites:
        layer = model.get_submodule(site.name)
        if site.cuts and site.cuts[0].groups > 2 and not site.cuts[0].of_rows:
            output = layer(torch.zeros(3, 0))
            assert torch.equal(output, torch.zeros(3, site.out_features) + (0 if layer.bias is None else layer.bias))
    found = model(input_ids=ids).logits
    assert torch.isfinite(found).all()
    put_modules(model, taken)
    assert torch.equal(model(input_ids=ids).logits, dense)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_factors_at_reduced_widths_are_pivoted_layers_of_the_reduced_shape() -> None:
    subject = Subject.of("random:tiny-llama")
    schedule = subject.schedule(0.5, 4)
    before = dict(subject.model.named_modules())
    taken = subject.repair_(schedule)
    for site in subject.sites:
        layer = subject.model.get_submodule(site.name)
        assert isinstance(layer, MPOLinear)
        assert (layer.out_features, layer.in_features, layer.chi) == (*site.shape(schedule[site.name].widths), 4)
        assert layer.legs.pivoted
    put_modules(subject.model, taken)
    assert dict(subject.model.named_modules()) == before


def test_a_schedule_that_cuts_a_bond_to_two_widths_is_refused_and_changes_nothing() -> None:
    subject = Subject.of(MODELS[0])
    dense, (name, _) = subject.logits(subject.batches), next(item for item in subject.schedule(0.5) if item[1].widths)
    torn = Schedule(tuple((site, DENSE if site == name else choice) for site, choice in subject.schedule(0.5)))
    with (
        ScheduleApplier(subject.model, subject.store) as applier,
        pytest.raises(ValueError, match="the same width, as"),
    ):
        applier.apply_(torn)
    with pytest.raises(ValueError, match="the same width, as"):
        subject.repair_(torn)
    assert torch.equal(subject.logits(subject.batches), dense)
