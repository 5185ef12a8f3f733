"""Bonds between matrices: found by a test on the model, cut exactly, priced as measured, restored bit for bit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from compression import FactorCache, FactorStore, ScheduleApplier, collect, discover_sites, lagrangian, to_schedule
from compression.bonds import bonds_by_kind, cut, discover_bonds, with_bonds
from compression.calibration.reach import reach_by_kind, with_reach
from compression.calibration.slopes import watch_slopes
from compression.schedule import DENSE, Choice, Joint, Schedule
from compression.sites import Unit, dense_weight, model_parameters, put_modules, units
from compression.size import SizeModel
from search.model.loading import load_model

MODELS = ("random:tiny-llama", "random:tiny-qwen2", "random:tiny-gpt2")


def store_of(name: str) -> tuple[nn.Module, FactorStore]:
    model = load_model(name, "cpu").model
    sites = discover_sites(model)
    sites = with_bonds(sites, discover_bonds(model, sites))
    weights = {site.name: dense_weight(model.get_submodule(site.name)) for site in sites if not site.dense_because}
    ids = torch.randint(0, 100, (8, 64), generator=torch.Generator().manual_seed(0))
    batches = [(ids, torch.ones_like(ids, dtype=torch.bool))]
    statistics = collect(model, sites, batches, torch.Generator().manual_seed(1))
    return model, FactorStore(sites, weights, lambda: statistics, "key", 0.01, FactorCache(None))


@pytest.mark.parametrize("name", MODELS)
def test_the_bonds_of_plain_blocks_are_found(name: str) -> None:
    model = load_model(name, "cpu").model
    found = {(bond.block, bond.kind): bond for bond in discover_bonds(model, discover_sites(model))}
    assert {(block, "hidden") for block in range(3)} <= found.keys()
    assert found[0, "hidden"].groups == 48
    if name != "random:tiny-gpt2":  # its q, k and v are one matrix
        heads = found[1, "heads"]
        assert (heads.groups, heads.rows, heads.columns) == (2, (16, 8, 8), 16)


class Mlp(nn.Module):
    """An MLP, or one whose hidden units cannot be removed one by one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 8)
        self.norm = nn.LayerNorm(20, elementwise_affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x).relu()
        if self.kind == "normed":  # units act on one another
            hidden = self.norm(hidden)
        if self.kind == "shifted":  # unit i is read as unit i + 1
            hidden = hidden.roll(1, -1)
        y = self.down(hidden)
        if self.kind == "read twice":
            y = y + hidden[..., :8]
        return y + hidden.mean(-1, keepdim=True) if self.kind == "averaged" else y


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.Sequential(Mlp(kind)) for _ in range(2))

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return x @ self.embedding.weight.T


@pytest.mark.parametrize("kind", ["plain", "normed", "shifted", "read twice", "averaged"])
def test_hidden_units_that_cannot_be_removed_one_by_one_are_no_bond(kind: str) -> None:
    model = Model(kind).eval()
    before = copy.deepcopy(model.state_dict())
    found = discover_bonds(model, discover_sites(model))
    assert [bond.name for bond in found] == (["layers.0.0", "layers.1.0"] if kind == "plain" else [])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bonds_are_found_with_biases_and_cutting_keeps_those_of_the_rows_left() -> None:
    module = nn.Linear(5, 6)
    smaller = cut(module, torch.tensor([0, 4]), torch.tensor([1, 2, 3]))
    assert torch.equal(smaller.weight, module.weight[[0, 4]][:, 1:4])
    assert torch.equal(smaller.bias, module.bias[[0, 4]])


@pytest.mark.parametrize("name", MODELS)
def test_a_unit_offers_widths_and_bond_dimensions_at_their_exact_size_and_cost(name: str) -> None:
    model, store = store_of(name)
    menu = store.menu()
    sizes = SizeModel(model, store.sites)
    checked = 0
    for options in menu.sites:
        if not isinstance(options.site, Unit) or options.site.block != 1:
            continue
        assert (np.diff(options.cost) < 0).all()
        assert options.choices[-1] == Joint((DENSE,) * len(options.site.sites))
        widths = {choice.choices[0].widths for choice in options.choices if isinstance(choice, Joint)}
        assert len(widths) > 2 or options.site.family == "self_attn"
        for index in range(0, len(options.choices) - 1, max(1, len(options.choices) // 7)):
            chosen = dict(options.assigned(index))
            schedule = Schedule(tuple((site.name, chosen.get(site.name, DENSE)) for site in store.sites))
            exact = sum(direct_cost(store, site.name, chosen[site.name]) for site in options.site.sites)
            widths_left = next(iter(chosen.values())).widths
            if options.site.family == "self_attn" and widths_left:  # the cost of removing heads counts twice
                exact += float(store.bonds.elimination(options.site.name).cost[widths_left[0]])
            assert options.cost[index] == pytest.approx(exact, rel=2e-3, abs=1e-9)
            size = sizes.size(schedule)
            with ScheduleApplier(model, store, packed=True) as applier:
                applier.apply_(schedule)
                assert model_parameters(model) == size.parameters
            matrices = sum(site.parameters for site in store.sites)
            saved = options.site.parameters - options.parameters[index]
            assert size.kept_fraction == pytest.approx((matrices - saved) / matrices)
            checked += 1
    assert checked >= 6


def direct_cost(store: FactorStore, name: str, choice: Choice) -> float:
    """½·tr(G E C Eᵀ) of the error E of one site: the whole matrix for the reader, the rows left for a writer."""
    [cut_of] = next(site.cuts for site in store.sites if site.name == name)
    whole = store._measured.matrix(name)
    rows = columns = slice(None)
    if choice.widths:
        kept = next(each for each in store.bonds.kept(name, choice.widths) if each is not None)
        rows, columns = (kept, slice(None)) if cut_of.of_rows else (slice(None), kept)
    if choice.is_dense:
        return 0.0
    if choice.is_plain:
        made = store.bonds.plain(name, choice.widths).double()
    else:
        left, right = (core.double() for core in store.cores(name, choice))
        made = left[0, :, 0] @ right[:, 0, :, 0]
    error = whole.weight[rows].clone()
    error[:, columns] -= made
    gradients = whole.gradients[rows][:, rows]
    return 0.5 * float((gradients @ error @ whole.inputs * error).sum())


@pytest.mark.parametrize("name", MODELS)
def test_a_schedule_with_widths_computes_what_the_masked_dense_model_does_and_is_undone(name: str) -> None:
    model, store = store_of(name)
    ids = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(3))
    dense, state = model(input_ids=ids).logits, copy.deepcopy(model.state_dict())
    plain = {}
    for unit in units(store.sites):
        if isinstance(unit, Unit):
            width = (store.bonds.elimination(unit.name).order.numel() + 1) // 2
            plain |= {site.name: Choice("dense", 0, "none", (width,)) for site in unit.sites}
    schedule = Schedule(tuple((site.name, plain.get(site.name, DENSE)) for site in store.sites))
    assert Schedule.from_json(schedule.to_json()) == schedule
    with ScheduleApplier(model, store) as applier:
        applier.apply_(schedule)
        found = model(input_ids=ids).logits
    masked = {}  # the refitted reader with zeros where it no longer reads
    for site in store.sites:
        if site.name in plain and not site.cuts[0].of_rows:
            weight = torch.zeros(site.out_features, site.in_features)
            weight[:, store.bonds.kept(site.name, plain[site.name].widths)[1]] = store.bonds.plain(
                site.name, plain[site.name].widths
            )
            layer = nn.Linear(site.in_features, site.out_features, bias=model.get_submodule(site.name).bias is not None)
            layer.weight.data = weight
            if layer.bias is not None:
                layer.bias.data = model.get_submodule(site.name).bias.data
            masked[site.name] = layer
    taken = {name: model.get_submodule(name) for name in masked}
    put_modules(model, masked)
    torch.testing.assert_close(found, model(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
    put_modules(model, taken)
    assert torch.equal(model(input_ids=ids).logits, dense)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS[:2])
def test_the_closed_form_meets_its_budget_over_units(name: str) -> None:
    model, store = store_of(name)
    menu = store.menu()
    for kept in (0.8, 0.5):
        schedule = to_schedule(menu, lagrangian(menu, int(kept * menu.dense_parameters)))
        size = SizeModel(model, store.sites).size(schedule)
        assert kept - 0.02 < size.kept_fraction <= kept
        assert [name for name, _ in schedule] == [site.name for site in store.sites]


def test_the_slope_of_a_unit_is_the_derivative_of_the_loss_towards_its_other_choice() -> None:
    model, store = store_of("random:tiny-llama")
    menu = store.menu()
    [options] = [one for one in menu.sites if isinstance(one.site, Unit) and one.site.name == "model.layers.1.mlp"]
    now, then = len(options.choices) // 3, 2 * len(options.choices) // 3
    ids = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(3))

    def schedule(index: int) -> Schedule:
        chosen = dict(options.assigned(index))
        return Schedule(tuple((site.name, chosen.get(site.name, DENSE)) for site in store.sites))

    with ScheduleApplier(model, store) as applier:
        applier.apply_(schedule(now))
        unit = options.site
        other = applier.replacement(unit, schedule(then))
        around = model.get_submodule(unit.name)
        with watch_slopes(model, {unit.name: other}) as slopes:
            model(input_ids=ids).logits.logsumexp(-1).sum().backward()
        losses = []
        for share in (0.0, 1e-3):
            mixed = around.register_forward_hook(
                lambda module, args, output, share=share: output + share * (other(*args) - output)
            )
            with torch.no_grad():
                losses.append(float(model(input_ids=ids).logits.double().logsumexp(-1).sum()))
            mixed.remove()
    assert slopes[unit.name] == pytest.approx((losses[1] - losses[0]) / 1e-3, rel=0.05)
    assert slopes[unit.name] != 0


def test_a_menu_offers_widths_without_factors_or_factors_without_widths_when_asked() -> None:
    _, store = store_of("random:tiny-llama")
    plain = [choice for options in store.menu(form="plain").sites for name, choice in options.assigned(0)]
    assert all(choice.is_plain for choice in plain)
    assert any(choice.widths for choice in plain)
    factors = store.menu(form="factors")
    assert [options.site.name for options in factors.sites] == [site.name for site in store.sites]
    assert not any(choice.widths for options in factors.sites for _, choice in options.assigned(0))


def test_bond_dimensions_of_units_are_the_multiples_that_are_asked_for() -> None:
    for options in store_of("random:tiny-llama")[1].menu(chi_multiple=2).sites:
        pairs = [options.assigned(index) for index in range(len(options.choices))]
        choices = [choice for pair in pairs for name, choice in pair if name.endswith(("gate_proj", "q_proj"))]
        chis = {choice.chi for choice in choices if not choice.widths}  # a narrow matrix has too few multiples
        assert len(chis) > 2
        assert not any(chi % 2 for chi in chis)


@pytest.mark.parametrize("multiple", [8, 16])
def test_widths_are_the_multiples_that_are_asked_for(multiple: int) -> None:
    store = store_of("random:tiny-llama")[1]
    for form in ("any", "plain"):
        for options in store.menu(form=form, multiple=multiple).sites:
            found = {choice.widths for index in range(len(options.choices)) for _, choice in options.assigned(index)}
            sizes = {site.shape(widths) for site in options.sites for widths in found}
            assert len(found) > 1
            assert not any(side % multiple for shape in sizes for side in shape)


@pytest.mark.parametrize("name", [*MODELS, "random:tiny-gemma2"])
def test_one_block_of_every_kind_tells_the_bonds_and_the_use_of_all(name: str) -> None:
    model = load_model(name, "cpu").model
    sites, modules = discover_sites(model), list(model.modules())
    assert bonds_by_kind(model, sites) == discover_bonds(model, sites)
    assert reach_by_kind(model, sites) == with_reach(model, sites)
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
