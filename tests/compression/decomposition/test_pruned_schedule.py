"""Schedules with pruned matrices: what they compute, their bytes, the menu that offers them, and their repair."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from tiny_bonds import SHRINKAGE, Subject, text
from torch.nn import functional

from compression import Menu, ScheduleApplier, dense_weight, lagrangian, to_schedule
from compression.calibration.blocks import Batch
from compression.decomposition.pruned_store import ladder
from compression.decomposition.repair import repair_
from compression.layers.rebuild import rebuilt
from compression.layers.sparse_linear import SparseLinear
from compression.schedule import DENSE, SPARSE, Choice, Joint, Schedule
from compression.sites import put_modules
from compression.size import SizeModel

MODELS = ("random:tiny-llama", "random:tiny-qwen2", "random:tiny-gpt2")  # of which two have biases, one is transposed


def pruned(subject: Subject, place: int = 3) -> Schedule:
    """Every site pruned to a place on its ladder, but for the last, which is dense."""
    *sites, last = subject.sites
    choices = [(site.name, Choice(SPARSE, ladder(site)[place], "two-sided")) for site in sites]
    return Schedule((*choices, (last.name, DENSE)))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_pruned_schedule_computes_what_the_dense_model_with_pruned_weights_does(name: str, packed: bool) -> None:
    subject, twin, batches = Subject.of(name), Subject.of(name).model, text(7, 1)
    before, schedule = subject.logits(batches), pruned(subject)
    with torch.no_grad():
        for site, (_, choice) in zip(subject.sites, schedule, strict=True):
            if choice.is_sparse:
                dense_weight(twin.get_submodule(site.name)).copy_(
                    subject.store.pruned.pruned(site.name, choice.chi).matrix
                )
        expected = torch.cat([twin(input_ids=ids).logits for ids, _ in batches]).log_softmax(-1)
    with ScheduleApplier(subject.model, subject.store, packed) as applier:
        applier.apply_(schedule)
        torch.testing.assert_close(subject.logits(batches), expected, rtol=1e-5, atol=1e-5)
        layers = sum(isinstance(module, SparseLinear) for module in subject.model.modules())
        assert layers == (len(subject.sites) - 1 if packed else 0)
    assert torch.equal(subject.logits(batches), before)


@pytest.mark.parametrize("name", MODELS)
def test_bytes_are_those_of_the_tensors_that_the_model_stores(name: str) -> None:
    subject = Subject.of(name)
    schedule, small = pruned(subject), SizeModel(subject.model, subject.sites, 2)
    whole = small.size(Schedule.dense(tuple(site.name for site in subject.sites)))
    with ScheduleApplier(subject.model, subject.store, packed=True) as applier:
        applier.apply_(schedule)
        tensors = {each.data_ptr(): each for each in subject.model.to(torch.bfloat16).state_dict().values()}
        stored = sum(each.numel() * each.element_size() for each in tensors.values())
        subject.model.to(torch.float32)
        assert small.size(schedule).bytes == stored
        numbers = sum(each.numel() for each in tensors.values() if each.is_floating_point())
        assert small.size(schedule).parameters == numbers
    priced = sum(small.choice_bytes(site, schedule[site.name]) for site in subject.sites)
    assert small.fixed_bytes + priced == stored < whole.bytes


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.of("random:tiny-llama")


def small_menu(subject: Subject) -> tuple[Menu, SizeModel]:
    sizes = SizeModel(subject.model, subject.sites, 2)
    return subject.store.menu(form="small", price=sizes.choice_bytes), sizes


def test_the_menu_of_the_form_small_offers_all_forms_by_their_bytes(subject: Subject) -> None:
    menu, sizes = small_menu(subject)
    found = set()
    for row in menu.sites:
        assert [int(size) for size in row.parameters] == [sizes.choice_bytes(row.site, each) for each in row.choices]
        for choice in row.choices:
            for one in cast(Joint, choice).choices:
                found.add((one.topology, bool(one.widths)))
    assert found == {("sparse", False), ("dense", False), ("dense", True), ("pivoted-lowrank", True)} | (
        found & {("pivoted-lowrank", False)}
    )


@pytest.mark.parametrize("kept", [0.9, 0.7, 0.5, 0.3])
def test_a_budget_of_bytes_is_met_and_costs_less_than_without_pruned_matrices(subject: Subject, kept: float) -> None:
    menu, sizes = small_menu(subject)
    without = subject.store.menu(price=sizes.choice_bytes)
    assert without.dense_parameters == menu.dense_parameters
    target = int(kept * menu.dense_parameters)
    chosen, other = lagrangian(menu, target), lagrangian(without, target)
    spent = sizes.bytes(to_schedule(menu, chosen)) - sizes.fixed_bytes
    steps = [min(int(step) for step in (row.parameters[1:] - row.parameters[:-1])) for row in menu.sites]
    assert target - 4 * max(steps) < spent <= target
    assert menu.cost(chosen) < without.cost(other)


@pytest.mark.parametrize("name", MODELS)
def test_repair_keeps_masks_and_lowers_the_divergence_also_on_other_text(name: str) -> None:
    subject = Subject.of(name)
    model, schedule, store = subject.model, pruned(subject, 6), subject.store
    for batches, most in ((subject.batches, 1.0), (text(7), 1.0)):
        dense = subject.logits(batches)

        def divergence(batches: list[Batch] = batches, dense: torch.Tensor = dense) -> float:
            found = subject.logits(batches)
            return float(functional.kl_div(found, dense, log_target=True, reduction="none").sum(-1).mean())

        with ScheduleApplier(model, store, packed=True) as applier:
            applier.apply_(schedule)
            before = divergence()
        how = subject.statistics, subject.batches, SHRINKAGE, store.bonds.elimination
        taken = repair_(model, subject.sites, schedule, *how, pruned=store.pruned.pruned)
        after = divergence()
        layers = {name: model.get_submodule(name) for name, choice in schedule if choice.is_sparse}
        put_modules(model, taken)
        assert after < most * before
        for site, layer in layers.items():
            assert isinstance(layer, SparseLinear)
            found = store.pruned.pruned(site, schedule[site].chi)
            assert torch.equal(layer.weight.detach() != 0, found.mask)
            assert not torch.equal(layer.weight.detach(), found.matrix)


def test_a_layer_comes_back_from_its_tensors_and_another_mask_is_refused(subject: Subject) -> None:
    site = subject.sites[0]
    choice = Choice(SPARSE, ladder(site)[0], "two-sided")
    found = subject.store.pruned.pruned(site.name, choice.chi)
    layer = SparseLinear.of(found.matrix, found.mask)
    again = rebuilt(site, choice, layer.state_dict())
    assert isinstance(again, SparseLinear)
    assert torch.equal(again.weight, layer.weight)
    state = dict(layer.state_dict())
    for change, message in (
        ({"bitmask": state["bitmask"] ^ 1}, "the mask is damaged: it names"),
        ({"bitmask": state["bitmask"][1:]}, "size mismatch for bitmask"),
        ({"values": state["values"][1:]}, "size mismatch for values"),
    ):
        with pytest.raises(ValueError, match=message):
            rebuilt(site, choice, state | change)


def test_a_pruned_matrix_keeps_its_widths() -> None:
    with pytest.raises(ValueError, match="a pruned matrix keeps all of its rows and columns"):
        Choice(SPARSE, 7, "two-sided", (3,))
    schedule = Schedule((("a", Choice(SPARSE, 7, "two-sided")),))
    assert Schedule.from_json(schedule.to_json()) == schedule
