"""A tiny random model with bonds between its matrices, its statistics, and schedules that cut every bond."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from compression import FactorCache, FactorStore, Site, Statistics, collect, discover_sites
from compression.bonds import discover_bonds, with_bonds
from compression.calibration.blocks import Batch
from compression.decomposition.entry_store import EntryForms
from compression.decomposition.repair import repair_
from compression.schedule import DENSE, Choice, Schedule
from compression.sites import dense_weight
from search.model.loading import load_model

SHRINKAGE = 0.003


def text(seed: int, batches: int = 4) -> list[Batch]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 100, (8, 40), generator=generator) for _ in range(batches)]
    return [(each, torch.ones_like(each, dtype=torch.bool)) for each in ids]


@dataclass
class Subject:
    """A model whose sites know their bonds, with statistics of its batches and a store of its factors."""

    model: nn.Module
    sites: tuple[Site, ...]
    statistics: Statistics
    store: FactorStore
    batches: list[Batch]

    @classmethod
    def of(cls, name: str, bits: Sequence[int] = (16,)) -> Subject:
        model = load_model(name, "cpu").model
        sites = discover_sites(model)
        sites = with_bonds(sites, discover_bonds(model, sites))
        assert any(site.cuts for site in sites)
        batches = text(0)
        statistics = collect(model, sites, batches, torch.Generator().manual_seed(1))
        weights = {site.name: dense_weight(model.get_submodule(site.name)) for site in sites}
        store = FactorStore(
            sites, weights, lambda: statistics, "key", SHRINKAGE, FactorCache(None), forms=EntryForms(tuple(bits))
        )
        return cls(model, sites, statistics, store, batches)

    def schedule(self, share: float, chi: int = 0, heads: bool = True) -> Schedule:
        """Every bond at a share of its groups, and what is left of its sites of rank `chi`; 0 for no factors."""
        choices = []
        for site in self.sites:
            choice = DENSE
            if site.cuts and (heads or site.cuts[0].groups > 2):
                widths = (int(share * site.cuts[0].groups),)
                choice = (
                    Choice("pivoted-lowrank", chi, "two-sided", widths) if chi else Choice("dense", 0, "none", widths)
                )
            choices.append((site.name, choice))
        return Schedule(tuple(choices))

    def repair_(self, schedule: Schedule, correct: bool = True) -> dict[str, nn.Module]:
        order = self.store.bonds.elimination
        return dict(repair_(self.model, self.sites, schedule, self.statistics, self.batches, SHRINKAGE, order, correct))

    def logits(self, batches: list[Batch]) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([self.model(input_ids=ids).logits for ids, _ in batches]).log_softmax(-1)
