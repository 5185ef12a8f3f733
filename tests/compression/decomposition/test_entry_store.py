"""Pruned and rounded matrices of a model: predicted against measured damage, and what the cache keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_bonds import SHRINKAGE, Subject, text

from compression import FactorCache, FactorStore, Site, dense_weight, shrink
from compression.decomposition.entry_store import EntryForms, EntryStore, entry_bytes, ladder
from compression.schedule import SPARSE, Choice
from compression.sites import put_modules

ALL = (16, 8, 4, 3, 2)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.of("random:tiny-llama")


def store_of(subject: Subject, cache: Path | None, bits: tuple[int, ...]) -> EntryStore:
    weights = {site.name: dense_weight(subject.model.get_submodule(site.name)) for site in subject.sites}
    what = subject.sites, weights, lambda: subject.statistics, "key", SHRINKAGE, FactorCache(cache)
    return FactorStore(*what, forms=EntryForms(bits)).entries


@pytest.mark.parametrize("form", ["pruned", "rounded", "both"])
def test_the_model_loses_about_what_the_costs_predict(subject: Subject, form: str) -> None:
    store, batches = store_of(subject, None, (16,) if form == "pruned" else ALL), text(7)
    predicted, layers = 0.0, {}
    for site in subject.sites:
        options = [
            option
            for option in store.options(site.name)
            if (option.choice.is_sparse, option.choice.bits)
            in {"pruned": [(True, 0)], "rounded": [(False, 4)], "both": [(True, 3)]}[form]
        ]
        option = min(options, key=lambda option: abs(option.choice.chi - 0.7 * site.parameters))
        dense = subject.model.get_submodule(site.name)
        layers[site.name] = store.entries(site.name, option.choice).layer(torch.float32, dense.bias, stored=True)
        predicted += option.cost
    before, dense = subject.logits(batches), {name: subject.model.get_submodule(name) for name in layers}
    put_modules(subject.model, layers)
    try:
        after = subject.logits(batches)
    finally:
        put_modules(subject.model, dense)
    measured = float((before.exp() * (before - after)).sum(-1).mean())
    assert measured == pytest.approx(predicted, rel=0.6 if form == "both" else 0.3)


@pytest.mark.parametrize("bits", [(16,), ALL])
def test_costs_are_those_of_the_matrices_that_the_cache_gives_back(
    subject: Subject, bits: tuple[int, ...], tmp_path: Path
) -> None:
    site = subject.sites[-1]
    expected = {(True, 0)} if bits == (16,) else {(False, 8), (False, 4), (False, 3), (False, 2), (True, 3)}
    for store in (store_of(subject, tmp_path, bits), store_of(subject, tmp_path, bits)):
        options = store.options(site.name)
        assert {(one.choice.is_sparse, one.choice.bits) for one in options} == expected
        assert [one.choice.chi for one in options if one.choice.is_sparse] == ladder(site, max(3, min(bits)))
        for option in options:
            found = store.entries(site.name, option.choice)
            error = (dense_weight(subject.model.get_submodule(site.name)) - found.matrix).double()
            c = shrink(subject.statistics.input(site.name), SHRINKAGE)
            g = shrink(subject.statistics.gradient(site.name), SHRINKAGE)
            assert option.cost == pytest.approx(0.5 * float((g @ error @ c * error).sum()), rel=1e-3)
            assert (found.mask is not None) == option.choice.is_sparse
            if found.mask is not None:
                assert int(found.mask.sum()) == option.choice.chi
                assert not found.matrix[~found.mask].any()
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(expected)


def test_more_bits_and_more_entries_cost_less(subject: Subject) -> None:
    store = store_of(subject, None, ALL)
    for site in subject.sites:
        rounded = {one.choice.bits: one.cost for one in store.options(site.name) if not one.choice.is_sparse}
        assert sorted(rounded, key=rounded.__getitem__) == [8, 4, 3, 2]
        pruned = [one.cost for one in store.options(site.name) if one.choice.is_sparse]
        assert pruned == sorted(pruned)


def test_what_cannot_be_pruned_is_refused(subject: Subject) -> None:
    site, entries = subject.sites[0], subject.store.entries
    with pytest.raises(ValueError, match=f"is not pruned to 3 entries; the nearest number is {ladder(site)[-1]}"):
        entries.entries(site.name, Choice(SPARSE, 3, "two-sided"))
    with pytest.raises(ValueError, match=f"to 9 entries of 4 bits; the nearest number is {ladder(site, 4)[-1]}"):
        entries.entries(site.name, Choice(SPARSE, 9, "two-sided", bits=4))
    assert ladder(Site("small", 0, "q", 1, 1)) == []


def test_the_bytes_of_a_cache_are_at_least_those_of_what_it_stores(subject: Subject, tmp_path: Path) -> None:
    site = subject.sites[-1]
    for bits in ((16,), ALL):
        store = store_of(subject, tmp_path / str(len(bits)), bits)
        store.options(site.name)
        stored = sum(file.stat().st_size for file in (tmp_path / str(len(bits))).rglob("*.safetensors"))
        assert stored - 20_000 < entry_bytes(site, 4, bits) * 1.3
