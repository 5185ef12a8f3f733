"""Pruned matrices of a model: predicted against measured damage, and what the cache keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_bonds import SHRINKAGE, Subject, text

from compression import FactorCache, FactorStore, Site, dense_weight, shrink
from compression.allocation.byte_menu import byte_menu, choice_bytes
from compression.decomposition.pruned_store import ladder
from compression.layers.sparse_linear import SparseLinear
from compression.schedule import SPARSE, Choice
from compression.sites import put_modules


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.of("random:tiny-llama")


def store_of(subject: Subject, cache: Path | None = None) -> FactorStore:
    weights = {site.name: dense_weight(subject.model.get_submodule(site.name)) for site in subject.sites}
    return FactorStore(subject.sites, weights, lambda: subject.statistics, "key", SHRINKAGE, FactorCache(cache))


def test_the_model_loses_about_what_the_costs_of_its_pruned_matrices_predict(subject: Subject) -> None:
    store, batches = subject.store.pruned, text(7)
    predicted, layers = 0.0, {}
    for site in subject.sites:
        kept = min(store.costs(site.name), key=lambda count: abs(count - 0.7 * site.parameters))
        found, dense = store.pruned(site.name, kept), subject.model.get_submodule(site.name)
        layers[site.name] = SparseLinear.of(found.matrix, found.mask, dense.bias)
        predicted += found.cost
    before, dense = subject.logits(batches), {name: subject.model.get_submodule(name) for name in layers}
    put_modules(subject.model, layers)
    try:
        after = subject.logits(batches)
    finally:
        put_modules(subject.model, dense)
    measured = float((before.exp() * (before - after)).sum(-1).mean())
    assert measured == pytest.approx(predicted, rel=0.3)


def test_costs_are_those_of_the_matrices_that_the_cache_gives_back(subject: Subject, tmp_path: Path) -> None:
    site = subject.sites[-1]
    for store in (store_of(subject, tmp_path).pruned, store_of(subject, tmp_path).pruned):
        costs = store.costs(site.name)
        assert list(costs) == ladder(site)
        for kept, cost in costs.items():
            found = store.pruned(site.name, kept)
            error = (dense_weight(subject.model.get_submodule(site.name)) - found.matrix).double()
            c = shrink(subject.statistics.input(site.name), SHRINKAGE)
            g = shrink(subject.statistics.gradient(site.name), SHRINKAGE)
            assert found.cost == cost == pytest.approx(0.5 * float((g @ error @ c * error).sum()), rel=1e-3)
            assert int(found.mask.sum()) == kept
            assert not found.matrix[~found.mask].any()
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_a_menu_counts_the_bytes_that_a_layer_stores_and_offers_pruned_beside_chi(subject: Subject) -> None:
    site = subject.sites[-1]
    costs = subject.store.pruned.costs(site.name)
    spectrum = subject.store.factors(site.name, "lowrank", "two-sided").spectrum.double().numpy()
    made, alone = byte_menu(site, spectrum, {}, 64, pruned=costs), byte_menu(site, spectrum, {}, 64)
    topologies = {choice.topology for choice in made.menu.choices}
    assert SPARSE in topologies
    for size, cost, choice in zip(made.menu.parameters, made.menu.cost, made.menu.choices, strict=True):
        assert cost <= alone.menu.cost[alone.menu.parameters <= size].min(initial=float("inf"))
        if choice.topology == SPARSE:
            found = subject.store.pruned.pruned(site.name, choice.chi)
            state = SparseLinear.of(found.matrix.half(), found.mask).state_dict()
            assert size == sum(values.numel() * values.element_size() for values in state.values())


def test_what_cannot_be_pruned_is_refused(subject: Subject) -> None:
    site = subject.sites[0]
    with pytest.raises(ValueError, match=f"is not pruned to 3 entries; the nearest number is {ladder(site)[-1]}"):
        subject.store.pruned.pruned(site.name, 3)
    with pytest.raises(ValueError, match="must have 16 bits per number, got 4"):
        choice_bytes(site, Choice(SPARSE, 9, "two-sided"), 4, 64)
    assert ladder(Site("small", 0, "q", 1, 1)) == []
