"""Stages: calibration, factors and workloads of a loaded model.

Composes engine and data. Knows no flag, no agent and no file of a run folder; `search.experiment.experiment` holds
what they make.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from compression.calibration.statistics import Statistics, collect
from compression.decomposition.factors import FactorStore
from compression.sites import Site, dense_weight
from compression.storage.factor_cache import FactorCache, cache_key
from search.data.splits import Text
from search.model.loading import LoadedModel

__all__ = ["CHUNK_TOKENS", "SHRINKAGE", "Calibration", "calibration_batches", "factor_store"]

CHUNK_TOKENS = 256
"""Longest text sequence: attention over longer ones costs time and says little more about the weights."""
_CALIBRATION_BATCH = 1024
SHRINKAGE = 0.01
"""Of the second moments, see `compression.numerics.whitening.shrink`; on search text a little better than 0.003."""


@dataclass
class Calibration:
    """Second moments of a model on a text: from the cache, or streamed when first asked for.

    Attributes:
        weighted: whether tokens are, see `compression.calibration.statistics`; if not, these are the moments of K-FAC.
        key: identity of the statistics: model, sites, text, seed.
    """

    loaded: LoadedModel
    sites: Sequence[Site]
    text: Text
    seed: int
    cache: FactorCache
    progress: Callable[[int], None] = lambda tokens: None
    weighted: bool = True
    _statistics: Statistics | None = field(default=None, repr=False)

    @property
    def key(self) -> str:
        sites = [site.name for site in self.sites]
        kind = "statistics" if self.weighted else "unweighted statistics"
        return cache_key(
            kind=kind, format=3, model=self.loaded.digest, sites=sites, text=self.text.digest, seed=self.seed
        )

    def __call__(self) -> Statistics:
        """The statistics; kept until `release`."""
        if self._statistics is None:
            bundle = self.cache.get_or_build(self.key, lambda: self._collect().to_bundle())
            self._statistics = Statistics.from_bundle(bundle)
        return self._statistics

    @cached_property
    def unweighted(self) -> Calibration:
        """The same with tokens that count alike: the first of two passes."""
        return dataclasses.replace(self, weighted=False, _statistics=None)

    def release(self) -> None:
        """Give the memory back."""
        self._statistics = self.unweighted._statistics = None

    def _collect(self) -> Statistics:
        model = self.loaded.model
        generator = torch.Generator(device=model.device).manual_seed(self.seed)
        batches = calibration_batches(self.loaded, self.text, self.seed)
        first = self.unweighted() if self.weighted else None
        return collect(model, self.sites, batches, generator, self.progress, first)


def factor_store(
    loaded: LoadedModel, sites: Sequence[Site], calibration: Calibration, cache: FactorCache
) -> FactorStore:
    """Factors of the sites of a dense model."""
    weights = {
        site.name: dense_weight(loaded.model.get_submodule(site.name)) for site in sites if not site.dense_because
    }
    return FactorStore(sites, weights, calibration, calibration.key, SHRINKAGE, cache)


def calibration_batches(loaded: LoadedModel, text: Text, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(input_ids, mask) batches in a seeded order, every row full but the last ones.

    Questions follow one another in a row as sentences do in prose: full rows waste nothing on padding.
    """
    device, separator = loaded.model.device, loaded.encode("\n\n")
    stream = [token for question in text.exam for token in (*question, *separator)]
    rows = [*text.prose, *(stream[start : start + CHUNK_TOKENS] for start in range(0, len(stream), CHUNK_TOKENS))]
    random.Random(seed).shuffle(rows)
    rows.sort(key=len, reverse=True)
    count = max(1, _CALIBRATION_BATCH // CHUNK_TOKENS)
    for start in range(0, len(rows), count):
        group = rows[start : start + count]
        length = len(group[0])
        ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in group], device=device)
        sizes = torch.tensor([len(row) for row in group], device=device)
        yield ids, torch.arange(length, device=device)[None, :] < sizes[:, None]
