"""Keeps the bundles of a cache that were used last, and removes the others from disk when they exceed a limit.

What is removed is built again when it is needed. Knows sizes and keys; does not know what the tensors mean.
"""

from __future__ import annotations

from collections.abc import Callable

from compression.storage.factor_cache import Bundle, FactorCache

__all__ = ["RecentBundles"]


class RecentBundles:
    """Holds the bundles that this process has used, in the order of their last use.

    Args:
        cache: stores the bundles on disk.
        limit: bytes of all bundles together; None keeps everything. The bundle that was used last always stays.
    """

    def __init__(self, cache: FactorCache, limit: int | None = None) -> None:
        self._cache = cache
        self._limit = limit
        self._bundles: dict[str, Bundle] = {}
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
        while self._limit is not None and self._bytes > self._limit and len(self._bundles) > 1:
            oldest = next(iter(self._bundles))
            self._bytes -= _bytes(self._bundles.pop(oldest))
            self._cache.drop(oldest)
        return bundle


def _bytes(bundle: Bundle) -> int:
    return sum(tensor.nbytes for tensor in bundle.tensors.values())
