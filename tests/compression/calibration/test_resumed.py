"""A collection that is continued from a stored state ends as an undisturbed one, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from compression import Statistics, collect, discover_sites
from compression.calibration import triangles
from compression.calibration.triangles import Triangles, triangle, whole
from compression.layers.experts import take_apart_
from compression.storage.factor_cache import Bundle
from search.model.loading import load_model


@pytest.mark.parametrize("size", [1, 5, 14, 15])
def test_a_triangle_makes_the_same_matrix_again(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triangles, "_SQUARE", 7)
    rows = torch.randn(7, size)
    matrix = rows.T @ rows
    matrix = matrix.triu() + matrix.triu(1).T
    vector = triangle(matrix)
    assert len(vector) == size * (size + 1) // 2
    assert torch.equal(whole(vector), matrix)
    assert {name: len(moment) for name, moment in Triangles({"a": vector}).items()} == {"a": size}


@pytest.mark.parametrize(("name", "weighted"), [("llama", False), ("llama", True), ("mixtral", True)])
def test_a_continued_collection_is_the_undisturbed_one(name: str, weighted: bool) -> None:
    model = load_model(f"random:tiny-{name}", "cpu").model
    take_apart_(model, "single")
    sites = discover_sites(model)
    ids = torch.randint(0, 200, (5, 2, 40), generator=torch.Generator().manual_seed(3))
    batches = [(one, torch.ones_like(one, dtype=torch.bool)) for one in ids]
    states: list[Bundle] = []

    def collected(first: Statistics | None, begun: Bundle | None, seen: list[int]) -> Statistics:
        def keep(state: Callable[[], Bundle]) -> None:
            states.append(state())

        generator = torch.Generator().manual_seed(1)
        return collect(model, sites, batches, generator, seen.append, first, begun=begun, keep=keep)

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
