"""Calibration that is killed goes on where it was, and the cache keeps only what later stages need."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compression import FactorCache, FactorStore, Statistics, dense_weight, discover_sites
from compression.allocation.menu import Menu
from search.data.splits import Text
from search.experiment import calibration
from search.experiment.calibration import Calibration
from search.model.loading import LoadedModel, load_model


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("random:tiny-llama", "cpu")


def made(loaded: LoadedModel, root: Path, name: str) -> Calibration:
    draws = torch.Generator().manual_seed(5)
    prose = tuple(tuple(torch.randint(0, 200, (256,), generator=draws).tolist()) for _ in range(16))
    return Calibration(
        loaded, discover_sites(loaded.model), Text(prose, (), frozenset()), 0, 0.05, FactorCache(root / name)
    )


def menu_of(loaded: LoadedModel, statistics: Statistics) -> Menu:
    sites = discover_sites(loaded.model)
    weights = {site.name: dense_weight(loaded.model.get_submodule(site.name)) for site in sites}
    return FactorStore(sites, weights, lambda: statistics, "key", 0.05, FactorCache(None)).menu()


class Killed(Exception):
    pass


def kill(tokens: int) -> None:
    if tokens > 2048:
        raise Killed


@pytest.mark.parametrize("killed_in", ["unweighted", "weighted"])
def test_a_killed_calibration_continues_and_gives_the_same(
    killed_in: str, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = made(loaded, tmp_path, "undisturbed")().to_bundle()
    monkeypatch.setattr(calibration, "_PAUSE", -1.0)
    monkeypatch.setattr(calibration, "_REST", -1.0)
    first = made(loaded, tmp_path, "killed")
    parts = {"unweighted": first.unweighted, "weighted": first}
    parts[killed_in].progress = kill
    with pytest.raises(Killed):
        first()
    seen: list[int] = []
    again = made(loaded, tmp_path, "killed")
    part = again if killed_in == "weighted" else again.unweighted
    part.progress = seen.append
    assert part.tokens_done == 2048
    found = again().to_bundle()
    assert seen == [3072, 4096]
    assert found.metadata == expected.metadata
    assert all(torch.equal(found.tensors[name], values) for name, values in expected.tensors.items())
    assert again.cache.has(again.key)
    assert not again.cache.has(again.unweighted.key)
    assert len(list((tmp_path / "killed").rglob("*.safetensors"))) == 1
    assert part.tokens_done == 0


@pytest.mark.slow
def test_by_block_the_moments_are_the_same_but_for_rounding_and_a_killed_calibration_continues(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = made(loaded, tmp_path, "exact")()
    monkeypatch.setattr(calibration, "LARGE", 0)
    expected = made(loaded, tmp_path, "undisturbed")
    whole = expected()
    assert whole.tokens == exact.tokens == 4096
    assert whole.input_of == exact.input_of
    for site in discover_sites(loaded.model):
        for found, known in ((whole.input, exact.input), (whole.gradient, exact.gradient)):
            moment, other = found(site.name), known(site.name)
            scale = other.diagonal().sqrt()
            assert ((moment - other).abs() <= 1e-4 * scale * scale[:, None]).all()
    for ours, theirs in zip(menu_of(loaded, whole).sites, menu_of(loaded, exact).sites, strict=True):
        assert ours.cost == pytest.approx(theirs.cost, rel=1e-3, abs=1e-9)
    first = made(loaded, tmp_path, "killed")
    passes = 4 * (1 + 3 * 3)
    for stop in (3, 17, 25):  # in the forward pass, in the first and in the second pass backward through the last block

        def kill_at(tokens: int, stop: int = stop) -> None:
            if tokens >= 4096 * stop // passes:
                raise Killed

        first.progress = kill_at
        with pytest.raises(Killed):
            first()
        assert not first.is_cached
    assert loaded.model.model.layers[0].mlp is not None
    seen: list[int] = []
    again = made(loaded, tmp_path, "killed")
    again.progress = seen.append
    assert again.tokens_done == 4096 * (1 + 3 + 2) // 10
    found = again()
    assert seen[0] > again.text.tokens * 24 // passes
    assert seen[-1] == 4096
    assert again.is_cached
    assert list((tmp_path / "killed" / "unfinished").iterdir()) == []
    for site in discover_sites(loaded.model):
        assert torch.equal(found.input(site.name), whole.input(site.name))
        assert torch.equal(found.gradient(site.name), whole.gradient(site.name))
