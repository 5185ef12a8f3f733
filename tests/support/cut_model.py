"""Tiny models whose bonds are cut: fewer hidden units in the MLPs, fewer heads in attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compression import FactorCache, FactorStore, ScheduleApplier, collect, discover_sites
from compression.bonds import discover_bonds, with_bonds
from compression.calibration.statistics import Statistics
from compression.numerics.legs import resolve
from compression.schedule import DENSE, Choice, Schedule
from compression.sites import Unit, dense_weight, units
from search.model.loading import LoadedModel, load_model

FORMS = ("plain", "factors", "empty")
"""Half of the groups of every bond, without and with factors; or no hidden unit in one MLP, and half of the heads."""

_STATISTICS: dict[str, Statistics] = {}


@dataclass
class Cut:
    """A model, its store, and a schedule that is not applied yet."""

    loaded: LoadedModel
    store: FactorStore
    schedule: Schedule

    def apply(self) -> ScheduleApplier:
        applier = ScheduleApplier(self.loaded.model, self.store, packed=True)
        applier.apply_(self.schedule)
        return applier


def cut_model(name: str = "random:tiny-llama", form: str = "plain") -> Cut:
    loaded = load_model(name, "cpu")
    model, generator = loaded.model, torch.Generator().manual_seed(0)
    with torch.no_grad():  # biases of zeros would hide that one is lost
        for path, parameter in model.named_parameters():
            if path.endswith("bias"):
                parameter.normal_(generator=generator).mul_(0.3)
    sites = discover_sites(model)
    sites = with_bonds(sites, discover_bonds(model, sites))
    weights = {site.name: dense_weight(model.get_submodule(site.name)) for site in sites if not site.dense_because}
    if name not in _STATISTICS:
        ids = torch.randint(0, 100, (8, 64), generator=generator)
        batches = [(ids, torch.ones_like(ids, dtype=torch.bool))]
        _STATISTICS[name] = collect(model, sites, batches, torch.Generator().manual_seed(1))
    statistics = _STATISTICS[name]
    store = FactorStore(sites, weights, lambda: statistics, "key", 0.01, FactorCache(None))
    chosen: dict[str, Choice] = {}
    for unit in units(sites):
        if isinstance(unit, Unit) and (form != "empty" or unit.family != "mlp" or unit.block == 1):
            width = 0 if form == "empty" and unit.family == "mlp" else unit.sites[0].cuts[0].groups // 2
            chosen |= {site.name: _choice(site, width, form == "factors") for site in unit.sites}
    return Cut(loaded, store, Schedule(tuple((site.name, chosen.get(site.name, DENSE)) for site in sites)))


def _choice(site, width: int, factored: bool) -> Choice:
    if not factored:
        return Choice("dense", 0, "none", (width,))
    chi = resolve("pivoted-lowrank", *site.shape((width,))).break_even_chi // 2
    return Choice("pivoted-lowrank", chi, "two-sided", (width,))
