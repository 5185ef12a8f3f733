"""Compute the calibration statistics and factors of a loaded model.

Combines the compression package with the search data. Does not know flags, agents or the files of a run folder.
`search.experiment.experiment` holds the results.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from compression.calibration.block_statistics import BlockStatistics
from compression.calibration.statistics import Statistics, collect
from compression.calibration.streaming import passes, stream
from compression.decomposition.entry_store import EntryForms, entry_bytes
from compression.decomposition.factors import FactorStore
from compression.sites import Site, dense_weight, model_parameters
from compression.storage.exclusive import exclusive
from compression.storage.factor_cache import Bundle, FactorCache, cache_key
from search.data.splits import Text
from search.model.kinds import Kind
from search.model.loading import LoadedModel
from search.model.streaming import ResidentModel

__all__ = ["CHUNK_TOKENS", "Calibration", "calibration_batches", "factor_limit", "factor_store", "moment_bytes"]

CHUNK_TOKENS = 256
"""Longest text sequence in tokens: attention over longer ones costs time and improves the statistics little."""
_CALIBRATION_BATCH = 1024
LARGE = 1 << 32
"""Bytes of moments from which on statistics are made block by block; those of smaller models are not rounded."""
_MODELS = 3
"""The cache of a large model takes at most this many times its size in bfloat16."""
_PAUSE, _REST = 90.0, 10.0
"""Seconds between two stored states of an unfinished collection, at least this many and this many times as long as
storing one takes."""


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
        how: dict[str, object] = {"read": self.loaded.kind.value} if self.loaded.kind.is_encoder else {}
        if self.by_block:
            how["by"] = "block"
        return cache_key(
            kind=kind, format=3, model=self.loaded.digest, sites=sites, text=self.text.digest, seed=self.seed, **how
        )

    @property
    def by_block(self) -> bool:
        """Whether moments are collected, rounded and stored one block at a time, as those of large models are."""
        if self.cache.root is None or self.loaded.kind is not Kind.CAUSAL or moment_bytes(self.sites) <= LARGE:
            return False
        return len({parameter.device for parameter in self.loaded.model.parameters()}) == 1

    @property
    def is_cached(self) -> bool:
        """Whether the cache has the statistics."""
        return self._blocks.complete() if self.by_block else self.cache.has(self.key)

    @property
    def parts(self) -> Sequence[tuple[str, Calibration]]:
        """What is collected one after the other, with the name of its stage; by block, both passes are one."""
        if self.by_block or not self.weighted:
            return (("calibrate", self),)
        return ("calibrate", self.unweighted), ("weight tokens", self)

    def __call__(self) -> Statistics:
        """The statistics, which are held until `release`.

        While they are collected, the state is stored every minute and a half, or by block after each batch. A process
        that is killed therefore loses no more than two minutes; the next one continues there and gets the same result.
        """
        if self._statistics is None and self.by_block:
            self._collect_by_block()
            self._statistics = self._blocks.whole()
        if self._statistics is None:
            bundle = self.cache.get_or_build(self.key, lambda: self._collect().to_bundle())
            self._statistics = Statistics.from_bundle(bundle)
            self.cache.drop(self._unfinished)
            if self.weighted:
                self.unweighted.release()  # needed for nothing else
                self.cache.drop(self.unweighted.key)
        return self._statistics

    @property
    def tokens_done(self) -> int:
        """Number of tokens that an interrupted process has stored the state of, an estimate if by block."""
        if not self.by_block:
            return int(self.cache.metadata(self._unfinished).get("tokens", 0))
        blocks, done = len(self._blocks.blocks), sum(map(self._blocks.has, self._blocks.blocks))
        before = 1 + blocks + done * (2 if self.weighted else 1)  # passes that `stream` does not make again
        return self.text.tokens * before // passes(blocks, 1, self.weighted) if done else 0

    @cached_property
    def unweighted(self) -> Calibration:
        """The calibration with equal weights for all tokens: the first of the two passes."""
        return dataclasses.replace(self, weighted=False, _statistics=None)

    def release(self) -> None:
        """Release the memory of the statistics."""
        self._statistics = None
        if self.weighted:
            self.unweighted.release()

    @property
    def _unfinished(self) -> str:
        return cache_key(kind="unfinished", format=1, of=self.key)

    @property
    def _blocks(self) -> BlockStatistics:
        return BlockStatistics(self.cache, self.key, self.sites)

    def _collect(self) -> Statistics:
        model = self.loaded.model
        generator = torch.Generator(device=model.device).manual_seed(self.seed)
        batches = calibration_batches(self.loaded, self.text, self.seed)
        first = self.unweighted() if self.weighted else None
        begun = self.cache.load(self._unfinished)
        how = self.loaded.mask_token, begun, self._keeper()
        return collect(model, self.sites, batches, generator, self.progress, first, *how)

    def _keeper(self) -> Callable[[Callable[[], Bundle]], None]:
        """A function that stores a state if the last one is old enough; storing takes at most a tenth of the time."""
        stored, pause = time.monotonic(), _PAUSE

        def keep(state: Callable[[], Bundle]) -> None:
            nonlocal stored, pause
            if self.cache.root is None or (begun := time.monotonic()) - stored < pause:
                return
            self.cache.replace(self._unfinished, state())
            stored = time.monotonic()
            pause = max(_PAUSE, _REST * (stored - begun))

        return keep

    def _collect_by_block(self) -> None:
        """Make sure that the cache has the statistics of every block. One process makes them, and others wait."""
        blocks, root = self._blocks, self.cache.root
        assert root is not None
        if blocks.complete():
            return
        model, kept = self.loaded.model, root / "unfinished" / self.key

        def visit(block: object, sites: Sequence[Site], statistics: Statistics) -> None:
            blocks.store(sites[0].block, statistics)

        with exclusive(root / "unfinished" / f"{self.key}.lock"), ResidentModel(model, self.sites) as resident:
            if blocks.complete():
                return
            generator = torch.Generator(device=model.device).manual_seed(self.seed)
            batches = list(calibration_batches(self.loaded, self.text, self.seed))
            total = passes(resident.blocks, len(batches), self.weighted)
            stream(
                resident,
                batches,
                generator,
                visit,
                progress=lambda done: self.progress(self.text.tokens * done // total),
                weighted=self.weighted,
                kept=kept,
            )


def moment_bytes(sites: Sequence[Site]) -> int:
    """Bytes of the second moments of sites in memory."""
    return 4 * sum(site.out_features**2 + site.in_features**2 for site in sites if not site.dense_because)


def factor_limit(model: nn.Module, sites: Sequence[Site], bits: Sequence[int] = ()) -> int:
    """Bytes of decompositions that the cache keeps of a model whose statistics are made by block.

    With the statistics they take three times the model in bfloat16, or what one low-rank decomposition of every matrix
    takes if that is more. A search visits other ranks and widths all the time; what it left long ago is not kept.

    Args:
        bits: bits per number of entries that menus offer, see `compression.decomposition.entry_store`; none if they
            offer no pruned or rounded matrices, which take more.
    """
    free = [site for site in sites if not site.dense_because]
    one = 2 * sum(min(site.out_features, site.in_features) * (site.out_features + site.in_features) for site in free)
    limit = max(one, _MODELS * 2 * model_parameters(model) - moment_bytes(sites) // 4)
    return limit + (sum(entry_bytes(site, 2, bits) for site in free) if bits else 0)


def factor_store(
    loaded: LoadedModel,
    sites: Sequence[Site],
    calibration: Calibration,
    cache: FactorCache,
    forms: EntryForms | None = None,
) -> FactorStore:
    """The factor store for the sites of a dense model; `forms` are those of entries, if menus offer any."""
    weights = {
        site.name: dense_weight(loaded.model.get_submodule(site.name)) for site in sites if not site.dense_because
    }
    how, bits = (calibration.key, calibration.shrinkage), () if forms is None else forms.bits
    half, limit = calibration.by_block, factor_limit(loaded.model, sites, bits) if calibration.by_block else None
    return FactorStore(sites, weights, calibration, *how, cache, half=half, limit=limit, forms=forms)


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
