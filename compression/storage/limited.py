"""Keeps the bundles of a cache that are used most often, and removes others from disk when they exceed a limit.

What is removed is built again when it is needed. Knows sizes and keys; does not know what the tensors mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from compression.storage.factor_cache import Bundle, FactorCache

__all__ = ["LimitedBundles"]


class LimitedBundles:
    """Holds the bundles that this process has used, in the order of their last use.

    Of those used least often, the one used last is removed first: schedules pass through the blocks of a model in turn,
    and whoever keeps what was used last has always just removed what comes next. In a search of a model of 630 million
    parameters, this halved the matrices that had to be decomposed again.

    Args:
        cache: stores the bundles on disk.
        limit: bytes of all bundles together; None keeps everything. The bundle that was used last always stays.
    """

    def __init__(self, cache: FactorCache, limit: int | None = None) -> None:
        self._cache = cache
        self._limit = limit
        self._bundles: dict[str, Bundle] = {}
        self._uses = Counter[str]()  # those of removed bundles too
        self._bytes = 0

    def get_or_build(self, key: str, build: Callable[[], Bundle]) -> Bundle:
        """Returns the bundle of `key`: that of an earlier call, or that of `FactorCache.get_or_build`.

        Raises:
            OSError: as for `FactorCache.get_or_build`.
        """
        bundle = self._bundles.pop(key, None)
        if bundle is None:
            bundle = self._cache.get_or_build(key, build)
            self._bytes += _bytes(bundle)
        self._bundles[key] = bundle
        self._uses[key] += 1
        while self._limit is not None and self._bytes > self._limit and len(self._bundles) > 1:
            _, *others = reversed(self._bundles)
            least = min(others, key=self._uses.__getitem__)  # the first of equals, which was used last
            self._bytes -= _bytes(self._bundles.pop(least))
            self._cache.drop(least)
        return bundle


def _bytes(bundle: Bundle) -> int:
    return sum(tensor.nbytes for tensor in bundle.tensors.values())
