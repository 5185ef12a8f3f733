"""Factors in 16 bits are those in 32 bits but for rounding, in half the space and under other keys.

So are matrices refitted to a cut bond. A cache with a limit drops some, and makes them again.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_bonds import SHRINKAGE, Subject

from compression import Choice, FactorCache, FactorStore, collect, contract, dense_weight, discover_sites
from search.model.loading import load_model


def test_factors_in_16_bits_are_those_in_32_bits_but_for_rounding(tmp_path: Path) -> None:
    model = load_model("random:tiny-llama", "cpu").model
    sites = discover_sites(model)
    weights = {site.name: dense_weight(model.get_submodule(site.name)) for site in sites}
    ids = torch.randint(0, 200, (4, 40), generator=torch.Generator().manual_seed(0))
    statistics = collect(model, sites, [(ids, ids >= 0)], torch.Generator().manual_seed(1))

    def store(folder: str, limit: int | None = None) -> FactorStore:
        cache = FactorCache(tmp_path / folder)
        return FactorStore(sites, weights, lambda: statistics, "key", 0.05, cache, half=folder != "32", limit=limit)

    whole, half, little = store("32"), store("16"), store("little", 20_000)
    for site in sites[:7]:
        for choice in (Choice("lowrank", 8, "two-sided"), Choice("mpo2", 4, "plain")):
            expected, found = (store.cores(site.name, choice) for store in (whole, half))
            assert [core.dtype for core in found] == [torch.float32] * len(found)
            assert all(map(torch.equal, little.cores(site.name, choice), found))
            error = contract(found) - contract(expected)
            assert 0 < float(error.norm()) < 1e-3 * float(contract(expected).norm())
    assert [one.cost.tolist() for one in half.menu().sites] == [one.cost.tolist() for one in whole.menu().sites]
    sizes = {
        folder.name: sum(file.stat().st_size for file in folder.rglob("*.safetensors")) for folder in tmp_path.iterdir()
    }
    assert sizes["16"] < 0.75 * sizes["32"]
    assert sizes["little"] < 24_000 < sizes["16"]  # the limit and headers
    first = sites[0].name, Choice("lowrank", 8, "two-sided")  # was removed, and is the same when it is made again
    assert all(map(torch.equal, little.cores(*first), half.cores(*first)))


def test_refitted_matrices_are_stored_in_16_bits_with_the_factors(tmp_path: Path) -> None:
    subject = Subject.of("random:tiny-llama")
    reader = next(site for site in subject.sites if site.cuts and not site.cuts[0].of_rows)
    widths = (reader.cuts[0].groups // 2,)
    weights = {site.name: dense_weight(subject.model.get_submodule(site.name)) for site in subject.sites}
    cache = FactorCache(tmp_path)
    half = FactorStore(subject.sites, weights, lambda: subject.statistics, "key", SHRINKAGE, cache, half=True)
    expected, found = (store.bonds.plain(reader.name, widths) for store in (subject.store, half))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected.half().float())
    assert not torch.equal(found, expected)
