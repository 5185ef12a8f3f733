"""Models whose moments count as large: these are held in float32, and everything made from them stays the same."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tiny_bonds import Subject

from compression import Choice, contract
from compression.numerics import large_moments
from compression.sites import put_modules


@dataclass
class Made:
    """What is made of a model, by site or unit; and the log-probabilities of the repaired one."""

    dtypes: set[torch.dtype]
    order_costs: dict[str, torch.Tensor]
    matrices: dict[str, torch.Tensor]
    entry_costs: dict[str, float]
    repaired: torch.Tensor

    @classmethod
    def of(cls, name: str) -> Made:
        subject = Subject.of(name, (16, 4))
        store, schedule = subject.store, subject.schedule(0.5, 5)
        bonds = sorted({cut.bond for site in subject.sites for cut in site.cuts})
        menu = store.menu(form="small")
        assert len(menu.sites) > 1
        matrices = {site.name: store.bonds.plain(site.name, schedule[site.name].widths) for site in subject.sites}
        for site in subject.sites:
            if site.cuts:
                matrices[f"{site.name} cut"] = contract(store.cores(site.name, schedule[site.name]))
            matrices[f"{site.name} whole"] = contract(store.cores(site.name, Choice("lowrank", 5, "two-sided")))
        costs = {
            f"{site.name} {option.choice}": option.cost
            for site in subject.sites
            for option in store.entries.options(site.name)
        }
        shrunk = [store.bonds.cut(site.name, ()) for site in subject.sites]
        orders = {bond: store.bonds.elimination(bond).cost for bond in bonds}
        taken = subject.repair_(schedule)
        found = subject.logits(subject.batches)
        put_modules(subject.model, taken)
        return cls({each.inputs.dtype for each in shrunk}, orders, matrices, costs, found)


@pytest.mark.parametrize("name", ["random:tiny-llama", "random:tiny-gpt2"])
def test_large_moments_in_float32_lead_to_the_same_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Made.of(name)
    monkeypatch.setattr(large_moments, "LARGE", 8)
    found = Made.of(name)
    assert (expected.dtypes, found.dtypes) == ({torch.float64}, {torch.float32})
    for bond, cost in expected.order_costs.items():
        torch.testing.assert_close(found.order_costs[bond], cost, rtol=1e-3, atol=1e-6 * float(cost[0]))
    for key, matrix in expected.matrices.items():
        assert float((found.matrices[key] - matrix).norm()) < 1e-3 * float(matrix.norm()), key
    assert found.entry_costs == pytest.approx(expected.entry_costs, rel=1e-3)
    divergence = (expected.repaired.exp() * (expected.repaired - found.repaired)).sum(-1).mean()
    assert float(divergence) < 1e-6
