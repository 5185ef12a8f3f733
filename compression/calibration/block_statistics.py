"""Stores the statistics of a large model block by block, rounded to 16 bits, and reads back only the block in use.

Knows statistics and the cache; does not know models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache

import torch

from compression.calibration.statistics import Statistics
from compression.calibration.triangles import rounded, unrounded
from compression.refusal import Refusal
from compression.sites import Site
from compression.storage.factor_cache import Bundle, FactorCache, cache_key

__all__ = ["BlockStatistics"]


class BlockStatistics:
    """The statistics of a model in the cache, one file a block.

    Args:
        cache: the cache.
        key: identifies the statistics of the whole model.
        sites: the sites of the model.
    """

    def __init__(self, cache: FactorCache, key: str, sites: Sequence[Site]) -> None:
        self._cache = cache
        self._key = key
        self._sites = [site for site in sites if not site.dense_because]
        self.blocks = sorted({site.block for site in self._sites})

    def has(self, block: int) -> bool:
        return self._cache.has(self._of(block))

    def complete(self) -> bool:
        return all(map(self.has, self.blocks))

    def store(self, block: int, statistics: Statistics) -> None:
        """Store the statistics of the sites of one block."""
        tensors = {}
        for kind, table in (("inputs", statistics.inputs), ("gradients", statistics.gradients)):
            for name, moment in table.items():
                tensors[f"{kind}/{name}"], tensors[f"{kind} diagonal/{name}"] = rounded(moment)
        about = {"input_of": json.dumps(dict(statistics.input_of)), "tokens": str(statistics.tokens)}
        self._cache.store(self._of(block), Bundle(tensors, about))

    def whole(self) -> Statistics:
        """The statistics of the model. A block is read when one of its moments is asked for; memory holds two blocks.

        Raises:
            Refusal: a block is missing.
        """
        abouts = [self._cache.metadata(self._of(block)) for block in self.blocks]
        input_of = {name: source for about in abouts for name, source in json.loads(about["input_of"]).items()}
        load = lru_cache(maxsize=2)(self._load)
        block_of = {site.name: site.block for site in self._sites}
        inputs, gradients = (_Moments(kind, block_of, load) for kind in ("inputs", "gradients"))
        return Statistics(inputs, input_of, gradients, int(abouts[0]["tokens"]))

    def _load(self, block: int) -> Bundle:
        bundle = self._cache.load(self._of(block))
        if bundle is None:
            raise Refusal(
                f"the statistics of block {block} are missing or damaged in the cache; start again to make them"
            )
        return bundle

    def _of(self, block: int) -> str:
        return cache_key(kind="statistics of a block", format=1, of=self._key, block=block)


class _Moments(Mapping[str, torch.Tensor]):
    """Moments of one kind by site name."""

    def __init__(self, kind: str, block_of: Mapping[str, int], load: Callable[[int], Bundle]) -> None:
        self._kind = kind
        self._block_of = block_of
        self._load = load

    def __getitem__(self, name: str) -> torch.Tensor:
        tensors = self._load(self._block_of[name]).tensors
        return unrounded(tensors[f"{self._kind}/{name}"], tensors[f"{self._kind} diagonal/{name}"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._block_of)

    def __len__(self) -> int:
        return len(self._block_of)
