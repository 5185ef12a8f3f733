"""Schedules with pruned and rounded matrices: what they compute, their bytes, their menu and their repair."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from tiny_bonds import SHRINKAGE, Subject, text
from torch.nn import functional

from compression import Menu, ScheduleApplier, dense_weight, lagrangian, to_schedule
from compression.calibration.blocks import Batch
from compression.decomposition.entry_store import ladder
from compression.decomposition.repair import repair_
from compression.layers.filled_linear import FilledLinear
from compression.layers.rebuild import rebuilt
from compression.layers.sparse_linear import SparseLinear
from compression.numerics.bitmask import unpack
from compression.numerics.packed_size import BITS
from compression.schedule import DENSE, SPARSE, Choice, Joint, Schedule
from compression.sites import Site, put_modules
from compression.size import SizeModel

MODELS = ("random:tiny-llama", "random:tiny-qwen2", "random:tiny-gpt2")  # of which two have biases, one is transposed


FORMS = ("pruned", "rounded", "both")


def small(subject: Subject, form: str = "pruned", place: int = 3, bits: int = 4) -> Schedule:
    """Every site pruned to a place on its ladder, rounded, or both, but for the last, which is dense."""
    *sites, last = subject.sites

    def choice(site: Site) -> Choice:
        if form == "rounded":
            return Choice("dense", 0, "two-sided", bits=bits)
        if form == "both":
            return Choice(SPARSE, ladder(site, 3)[0], "two-sided", bits=3)
        return Choice(SPARSE, ladder(site)[place], "two-sided")

    return Schedule((*((site.name, choice(site)) for site in sites), (last.name, DENSE)))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_small_schedule_computes_what_the_dense_model_with_its_matrices_does(
    name: str, packed: bool, form: str
) -> None:
    subject, twin, batches = Subject.of(name), Subject.of(name).model, text(7, 1)
    before, schedule = subject.logits(batches), small(subject, form)
    with torch.no_grad():
        for site, (_, choice) in zip(subject.sites, schedule, strict=True):
            if choice.keeps_entries:
                dense_weight(twin.get_submodule(site.name)).copy_(
                    subject.store.entries.entries(site.name, choice).matrix
                )
        expected = torch.cat([twin(input_ids=ids).logits for ids, _ in batches]).log_softmax(-1)
    with ScheduleApplier(subject.model, subject.store, packed) as applier:
        applier.apply_(schedule)
        torch.testing.assert_close(subject.logits(batches), expected, rtol=1e-5, atol=1e-5)
        layers = sum(isinstance(module, FilledLinear) for module in subject.model.modules())
        assert layers == (len(subject.sites) - 1 if packed else 0)
    assert torch.equal(subject.logits(batches), before)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("form", "bits"), [("pruned", 4), ("both", 4), *(("rounded", bits) for bits in BITS)])
def test_bytes_are_those_of_the_tensors_that_the_model_stores(name: str, form: str, bits: int) -> None:
    subject = Subject.of(name)
    schedule, sizes = small(subject, form, bits=bits), SizeModel(subject.model, subject.sites, 2)
    whole = sizes.size(Schedule.dense(tuple(site.name for site in subject.sites)))
    with ScheduleApplier(subject.model, subject.store, packed=True) as applier:
        applier.apply_(schedule)
        tensors = {each.data_ptr(): each for each in subject.model.to(torch.bfloat16).state_dict().values()}
        stored = sum(each.numel() * each.element_size() for each in tensors.values())
        subject.model.to(torch.float32)
        assert sizes.size(schedule).bytes == stored
        if form == "pruned":
            numbers = sum(each.numel() for each in tensors.values() if each.is_floating_point())
            assert sizes.size(schedule).parameters == numbers
    priced = sum(sizes.choice_bytes(site, schedule[site.name]) for site in subject.sites)
    assert sizes.fixed_bytes + priced == stored < whole.bytes


@pytest.fixture(scope="module", params=[(16,), (8, 4, 3, 2, 16)], ids=["pruned", "rounded"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject.of("random:tiny-llama", request.param)


def offered(subject: Subject) -> list[Choice]:
    return [option.choice for site in subject.sites for option in subject.store.entries.options(site.name)]


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
                found.add((one.topology, bool(one.widths), one.bits))
    entries = {(each.topology, False, each.bits) for each in offered(subject)}
    assert entries & found
    assert found - entries <= {(DENSE.topology, cut, 0) for cut in (False, True)} | {
        ("pivoted-lowrank", cut, 0) for cut in (False, True)
    }


@pytest.mark.parametrize("kept", [0.9, 0.7, 0.5, 0.3])
def test_a_budget_of_bytes_is_met_and_costs_less_than_without_pruned_matrices(subject: Subject, kept: float) -> None:
    menu, sizes = small_menu(subject)
    without = subject.store.menu(price=sizes.choice_bytes)
    assert without.dense_parameters == menu.dense_parameters
    target = int(kept * menu.dense_parameters)
    chosen, other = lagrangian(menu, target), lagrangian(without, target)
    spent = sizes.bytes(to_schedule(menu, chosen)) - sizes.fixed_bytes
    steps = [min(int(step) for step in (row.parameters[1:] - row.parameters[:-1])) for row in menu.sites]
    assert target - max(4 * max(steps), 0.03 * target) < spent <= target
    assert menu.cost(chosen) < (0.2 if any(each.bits for each in offered(subject)) else 1) * without.cost(other)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", FORMS)
def test_repair_keeps_masks_and_lowers_the_divergence_also_on_other_text(name: str, form: str) -> None:
    subject = Subject.of(name)
    model, schedule, store = subject.model, small(subject, form, 6, bits=3), subject.store
    for batches, most in ((subject.batches, 1.0), (text(7), 1.0)):
        dense = subject.logits(batches)

        def divergence(batches: list[Batch] = batches, dense: torch.Tensor = dense) -> float:
            found = subject.logits(batches)
            return float(functional.kl_div(found, dense, log_target=True, reduction="none").sum(-1).mean())

        with ScheduleApplier(model, store, packed=True) as applier:
            applier.apply_(schedule)
            before = divergence()
        how = subject.statistics, subject.batches, SHRINKAGE, store.bonds.elimination
        taken = repair_(model, subject.sites, schedule, *how, entries=store.entries.entries)
        after = divergence()
        layers = {name: model.get_submodule(name) for name, choice in schedule if choice.keeps_entries}
        put_modules(model, taken)
        assert after < most * before
        changed = 0
        for site, layer in layers.items():
            assert isinstance(layer, FilledLinear)
            found = store.entries.entries(site, schedule[site])
            changed += not torch.equal(layer.weight.detach(), found.matrix)
            if found.mask is not None:
                assert not layer.weight.detach()[~found.mask].any()
            if isinstance(layer, SparseLinear):
                assert torch.equal(unpack(layer.bitmask, layer.in_features), found.mask)
        assert changed > 0.5 * len(layers)  # the first sites of the first block read what they read before


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_comes_back_from_its_tensors_and_others_are_refused(subject: Subject, form: str) -> None:
    site = subject.sites[0]
    choice = small(subject, form)[site.name]
    layer = subject.store.entries.entries(site.name, choice).layer(torch.float32, None, stored=True)
    again = rebuilt(site, choice, layer.state_dict())
    assert type(again) is type(layer)
    assert torch.equal(again.weight, layer.weight)
    state = dict(layer.state_dict())
    wrong = []
    if form != "rounded":
        wrong += [("bitmask", state["bitmask"] ^ 1, "the mask is damaged: it names")]
        wrong += [("bitmask", state["bitmask"][1:], "size mismatch for bitmask")]
    if form == "pruned":
        wrong += [("values", state["values"][1:], "size mismatch for values")]
    else:
        wrong += [("packed.codes", state["packed.codes"][:, 1:], "in [34] bits: .*size mismatch for packed.codes")]
    for name, change, message in wrong:
        with pytest.raises(ValueError, match=message):
            rebuilt(site, choice, state | {name: change})


def test_a_choice_of_entries_keeps_its_widths_and_comes_back_from_json() -> None:
    with pytest.raises(ValueError, match="a pruned matrix keeps all of its rows and columns"):
        Choice(SPARSE, 7, "two-sided", (3,))
    with pytest.raises(ValueError, match="a rounded matrix keeps all of its rows and columns"):
        Choice("dense", 0, "two-sided", (3,), bits=4)
    with pytest.raises(ValueError, match="bits of a matrix must be one of 8, 6, 5, 4, 3, 2, or 0, got 7"):
        Choice("dense", 0, "two-sided", bits=7)
    with pytest.raises(ValueError, match="only a matrix without factors can be rounded, got 'lowrank' in 4 bits"):
        Choice("lowrank", 3, "two-sided", bits=4)
    rows = [("a", Choice(SPARSE, 7, "two-sided")), ("b", Choice("dense", 0, "two-sided", bits=4))]
    schedule = Schedule((*rows, ("c", Choice(SPARSE, 7, "two-sided", bits=3)), ("d", DENSE)))
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert not schedule["b"].is_dense
    assert [choice.keeps_entries for _, choice in schedule] == [True, True, True, False]
