"""What a run takes is estimated from shapes: exactly for what is stored, and by block where moments are large."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compression import discover_sites
from compression.decomposition.entry_store import entry_bytes
from compression.sites import model_bytes, model_parameters
from compression.storage.factor_cache import FactorCache
from search.data.splits import Text
from search.experiment import calibration, preparation
from search.experiment.calibration import Calibration, factor_limit, moment_bytes
from search.experiment.needs import needs
from search.experiment.preparation import check_space
from search.model.architecture import empty_model
from search.model.loading import load_model
from search.model.pretrained import Source


def experiment(root: Path | None) -> Any:
    loaded = load_model("random:tiny-llama", "cpu")
    sites = discover_sites(loaded.model)
    text = Text(tuple((5,) * 256 for _ in range(4)), (), frozenset())
    made = Calibration(loaded, sites, text, 0, 0.05, FactorCache(root))
    splits = SimpleNamespace(calibration=text)
    config = SimpleNamespace(repair_tokens=512, heal_minutes=1.0, form="any", offered_bits=())
    return SimpleNamespace(
        config=config,
        loaded=loaded,
        sites=sites,
        calibration=made,
        splits=splits,
        device=torch.device("cpu"),
        budget=SimpleNamespace(target_kept=0.8),
    )


@pytest.mark.parametrize("by_block", [False, True])
def test_stored_statistics_take_what_is_estimated(
    by_block: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_block:
        monkeypatch.setattr(calibration, "LARGE", 0)
    opened = experiment(tmp_path)
    load, calibrate, decompose, repair, heal = needs(opened)
    assert load.memory == model_bytes(opened.loaded.model)
    assert min(calibrate.memory, decompose.memory) > load.memory
    opened.calibration()
    stored = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    kept = moment_bytes(opened.sites) // (4 if by_block else 2)
    assert kept < stored < 1.5 * kept  # names and diagonals come on top
    assert calibrate.disk > kept
    assert repair.disk > decompose.disk > kept
    assert heal.disk == decompose.disk
    left = int(0.8 * sum(site.parameters for site in opened.sites))
    passed = 512 * 4 * sum(site.in_features + site.out_features for site in opened.sites)
    assert heal.memory == load.memory + 8 * left + passed + 64 * 257 * 16
    opened.device = torch.device("cuda")
    assert needs(opened)[-1].memory == heal.memory + 4 * left  # passes are replayed, into gradients that stay
    opened.device = torch.device("cpu")
    opened.config.heal_minutes = 0.0
    assert [each.stage for each in needs(opened)] == ["load", "calibrate", "decompose", "repair"]
    opened.config.form, opened.config.offered_bits = "small", (16, 4, 3)
    more = sum(entry_bytes(site, 2 if by_block else 4, opened.config.offered_bits) for site in opened.sites)
    assert needs(opened)[2].disk == decompose.disk + more


@pytest.mark.parametrize(
    "name, most", [("random:llama-3.2-1b", 3.01), ("random:qwen2.5-1.5b", 3.45), ("random:llama-2-7b", 3.01)]
)
def test_the_cache_of_a_large_model_takes_about_three_times_its_size_in_bfloat16(name: str, most: float) -> None:
    model = empty_model(Source(name, name, "none"))
    sites = discover_sites(model, shapes_only=True)
    taken = moment_bytes(sites) // 4 + factor_limit(model, sites)
    assert 2.99 < taken / (2 * model_parameters(model)) < most


def test_too_little_disk_stops_a_run_and_too_little_memory_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    opened = experiment(tmp_path)
    check_space(opened, said.append)
    assert said == []
    monkeypatch.setattr(preparation, "available_memory", lambda: 1000)
    check_space(opened, said.append)
    assert "GB of memory, and 0.0 GB are available; --dtype bfloat16 halves the model" in said[0]
    monkeypatch.setattr(preparation.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"needs .* MB of disk and 0\.0 MB are free; free some, or name") as refused:
        check_space(opened, said.append)
    assert refused.value.errno == errno.ENOSPC
