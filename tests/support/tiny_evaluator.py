"""An evaluator of a tiny random model on two short sequences."""

from __future__ import annotations

from typing import Any

import torch

from compression import Choice, FactorCache, FactorStore, Schedule, collect, dense_weight, discover_sites
from search.evaluation.evaluator import ModelEvaluator
from search.evaluation.packed_sequences import packed_item, packed_text
from search.evaluation.workload import Workload
from search.model.loading import LoadedModel

CPU = torch.device("cpu")


def evaluator_of(loaded: LoadedModel, **how: Any) -> tuple[ModelEvaluator, FactorStore]:
    sites = discover_sites(loaded.model)
    weights = {site.name: dense_weight(loaded.model.get_submodule(site.name)).clone() for site in sites}
    ids = torch.tensor([loaded.encode("Text to calibrate on, a little of it. " * 8)])
    mask = torch.ones_like(ids, dtype=torch.bool)
    store = FactorStore(
        sites,
        weights,
        lambda: collect(loaded.model, sites, [(ids, mask)], torch.Generator().manual_seed(0)),
        "key",
        0.01,
        FactorCache(None),
    )
    store.menu()
    workload = Workload(
        [
            packed_item(loaded.encode, "Question: What?\nAnswer:", (" this", " that one"), 1),
            packed_text(loaded.encode("Something else that is read.")),
        ],
        loaded.model,
    )
    return ModelEvaluator(loaded.model, store, [workload], **how), store


def everywhere(store: FactorStore, chi: int) -> Schedule:
    return Schedule(tuple((site.name, Choice("lowrank", chi, "two-sided")) for site in store.sites))
