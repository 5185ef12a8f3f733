"""The bundles that are used most often stay on disk, up to a limit; others are removed and built again when needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compression.storage.factor_cache import Bundle, FactorCache, cache_key
from compression.storage.limited import LimitedBundles


@pytest.mark.parametrize(
    "limit, stays, built",
    [(None, {0, 1, 2}, [0, 1, 2]), (80, {0, 2}, [0, 1, 2, 1]), (1, {2}, [0, 1, 0, 2, 1])],
)
def test_what_is_used_most_stays_and_the_rest_is_built_again(
    limit: int | None, stays: set[int], built: list[int], tmp_path: Path
) -> None:
    cache, made = FactorCache(tmp_path), []
    limited = LimitedBundles(cache, limit)

    def use(number: int) -> torch.Tensor:
        def build() -> Bundle:
            made.append(number)
            return Bundle({"values": torch.full((10,), float(number))})  # 40 bytes

        return limited.get_or_build(cache_key(number=number), build).tensors["values"]

    for number in (0, 1, 0, 2):
        assert use(number).tolist() == [number] * 10
    assert {number for number in range(3) if cache.has(cache_key(number=number))} == stays
    assert use(1).tolist() == [1] * 10
    assert made == built


def test_one_pass_after_the_other_finds_what_fits(tmp_path: Path) -> None:
    made: list[int] = []

    def build(number: int) -> Bundle:
        made.append(number)
        return Bundle({"values": torch.zeros(10)})

    limited = LimitedBundles(FactorCache(tmp_path), limit=3 * 40)
    for number in 3 * [0, 1, 2, 3]:
        limited.get_or_build(cache_key(number=number), lambda number=number: build(number))  # type: ignore[misc]
    assert made == [0, 1, 2, 3, 2, 3, 2, 3], "0 and 1 stay, where all would be made again if what was used last stayed"
