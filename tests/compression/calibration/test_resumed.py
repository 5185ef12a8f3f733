"""A collection that is continued from a stored state ends as an undisturbed one, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from compression import Statistics, collect, discover_sites
from compression.calibration.triangles import Triangles, triangle, whole
from compression.storage.factor_cache import Bundle
from search.model.loading import load_model


def test_a_triangle_makes_the_same_matrix_again() -> None:
    rows = torch.randn(7, 5)
    matrix = rows.T @ rows
    matrix = matrix.triu() + matrix.triu(1).T
    vector = triangle(matrix)
    assert len(vector) == 15
    assert torch.equal(whole(vector), matrix)
    assert {name: len(moment) for name, moment in Triangles({"a": vector}).items()} == {"a": 5}


@pytest.mark.parametrize("weighted", [False, True])
def test_a_continued_collection_is_the_undisturbed_one(weighted: bool) -> None:
    model = load_model("random:tiny-llama", "cpu").model
    sites = discover_sites(model)
    ids = torch.randint(0, 200, (5, 2, 40), generator=torch.Generator().manual_seed(3))
    batches = [(one, torch.ones_like(one, dtype=torch.bool)) for one in ids]
    states: list[Bundle] = []

    def collected(first: Statistics | None, begun: Bundle | None, seen: list[int]) -> Statistics:
        def keep(state: Callable[[], Bundle]) -> None:
            states.append(state())

        generator = torch.Generator().manual_seed(1)
        return collect(model, sites, batches, generator, seen.append, first, begun, keep)

    first = collected(None, None, []) if weighted else None
    states.clear()
    undisturbed, whole_run = (seen := []), collected(first, None, seen)
    assert undisturbed == [80, 160, 240, 320, 400]
    rest: list[int] = []
    continued = collected(first, states[2], rest)
    assert rest == [320, 400]
    ours, theirs = continued.to_bundle(), whole_run.to_bundle()
    assert ours.metadata == theirs.metadata
    assert all(torch.equal(ours.tensors[name], values) for name, values in theirs.tensors.items())


def test_statistics_that_earlier_versions_stored_whole_are_read() -> None:
    moment = torch.eye(3) + 0.5
    stored = Bundle({"input/a": moment, "gradient/a": 2 * moment}, {"input_of": '{"a": "a"}', "tokens": "9"})
    earlier = Statistics.from_bundle(stored)
    again = Statistics.from_bundle(earlier.to_bundle())
    for found in (earlier, again):
        assert torch.equal(found.input("a"), moment)
        assert torch.equal(found.gradient("a"), 2 * moment)
        assert found.tokens == 9
