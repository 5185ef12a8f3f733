"""Compute the calibration statistics and factors of a loaded model.

Combines the compression package with the search data. Does not know flags, agents or the files of a run folder.
`search.experiment.experiment` holds the results.
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

__all__ = ["CHUNK_TOKENS", "Calibration", "calibration_batches", "factor_store"]

CHUNK_TOKENS = 256
"""Longest text sequence in tokens: attention over longer ones costs time and improves the statistics little."""
_CALIBRATION_BATCH = 1024


@dataclass
class Calibration:
    """Second moments of a model on the calibration text, read from the cache or collected at the first call.

    Attributes:
        loaded: the dense model and its tokenizer.
        sites: the sites to collect for.
        text: the calibration text.
        seed: seed of the order of the batches and of the random draws.
        shrinkage: shrinkage of the moments where they are used, see `compression.numerics.whitening.shrink`.
        cache: cache of the statistics.
        progress: called with the number of tokens processed so far.
        weighted: whether tokens are weighted, see `compression.calibration.statistics`. Without weights these are the
            moments of K-FAC.
        key: cache key of the statistics, a digest of model, sites, text and seed.
    """

    loaded: LoadedModel
    sites: Sequence[Site]
    text: Text
    seed: int
    shrinkage: float
    cache: FactorCache
    progress: Callable[[int], None] = lambda tokens: None
    weighted: bool = True
    _statistics: Statistics | None = field(default=None, repr=False)

    @property
    def key(self) -> str:
        sites = [site.name for site in self.sites]
        kind = "statistics" if self.weighted else "unweighted statistics"
        read: dict[str, object] = {"read": self.loaded.kind.value} if self.loaded.kind.is_encoder else {}
        return cache_key(
            kind=kind, format=3, model=self.loaded.digest, sites=sites, text=self.text.digest, seed=self.seed, **read
        )

    def __call__(self) -> Statistics:
        """The statistics, which stay in memory until `release`."""
        if self._statistics is None:
            bundle = self.cache.get_or_build(self.key, lambda: self._collect().to_bundle())
            self._statistics = Statistics.from_bundle(bundle)
        return self._statistics

    @cached_property
    def unweighted(self) -> Calibration:
        """The calibration with equal weights for all tokens: the first of the two passes."""
        return dataclasses.replace(self, weighted=False, _statistics=None)

    def release(self) -> None:
        """Release the memory of the statistics."""
        self._statistics = self.unweighted._statistics = None

    def _collect(self) -> Statistics:
        model = self.loaded.model
        generator = torch.Generator(device=model.device).manual_seed(self.seed)
        batches = calibration_batches(self.loaded, self.text, self.seed)
        first = self.unweighted() if self.weighted else None
        return collect(model, self.sites, batches, generator, self.progress, first, self.loaded.mask_token)


def factor_store(
    loaded: LoadedModel, sites: Sequence[Site], calibration: Calibration, cache: FactorCache
) -> FactorStore:
    """The factor store for the sites of a dense model."""
    weights = {
        site.name: dense_weight(loaded.model.get_submodule(site.name)) for site in sites if not site.dense_because
    }
    return FactorStore(sites, weights, calibration, calibration.key, calibration.shrinkage, cache)


def calibration_batches(loaded: LoadedModel, text: Text, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches (input_ids, mask) of calibration text, from a seeded shuffle sorted by descending row length.

    Questions are concatenated and cut into rows of `CHUNK_TOKENS` tokens, so that almost no row needs padding. Every
    row starts with the special tokens that start a text. For an encoder it also ends with those that end one, and some
    tokens are masked if the model predicts masked ones.
    """
    device, separator, beginning = loaded.model.device, loaded.encode("\n\n"), loaded.beginning
    stream = [token for question in text.exam for token in (*question[len(beginning) :], *separator)]
    room = CHUNK_TOKENS - len(beginning)
    rows = [*text.prose, *((*beginning, *stream[start : start + room]) for start in range(0, len(stream), room))]
    if loaded.kind.is_encoder:
        rows = [loaded.whole(row) if loaded.mask_token is None else loaded.masked(row)[0] for row in rows]
    random.Random(seed).shuffle(rows)
    rows.sort(key=len, reverse=True)
    count = max(1, _CALIBRATION_BATCH // CHUNK_TOKENS)
    for start in range(0, len(rows), count):
        group = rows[start : start + count]
        length = len(group[0])
        ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in group], device=device)
        sizes = torch.tensor([len(row) for row in group], device=device)
        yield ids, torch.arange(length, device=device)[None, :] < sizes[:, None]
