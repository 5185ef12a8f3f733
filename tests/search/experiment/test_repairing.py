"""A repair says where it continues, and continues only what has the same model, statistics, schedule and settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compression import Schedule, Site
from compression.decomposition.unfinished_repair import UnfinishedRepair
from compression.storage.factor_cache import FactorCache
from search.experiment.repairing import repaired_, unfinished_repair
from search.runtime.console import Console

SITES = [Site(f"layers.{block}.q", block, "q", 4, 4) for block in range(4)]
SCHEDULE = Schedule.dense(tuple(site.name for site in SITES))


def opened(root: Path, **other: Any) -> Any:
    settings = {"digest": "model", "key": "statistics", "shrinkage": 0.05, "repair_tokens": 512} | other
    seen: list[int] = []

    def repair_(
        schedule: Schedule, tokens: int, progress: Callable[[int], None], unfinished: UnfinishedRepair
    ) -> dict[str, torch.nn.Module]:
        seen.append(unfinished.blocks)
        for done in range(unfinished.blocks, 5):
            progress(done)
        return {}

    calibration = SimpleNamespace(key=settings["key"], cache=FactorCache(root))
    loaded = SimpleNamespace(digest=settings["digest"])
    config = SimpleNamespace(shrinkage=settings["shrinkage"], repair_tokens=settings["repair_tokens"])
    return SimpleNamespace(
        loaded=loaded, calibration=calibration, config=config, sites=SITES, repair_=repair_, seen=seen
    )


def test_a_repair_continues_what_was_made_for_the_same_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = opened(tmp_path)
    unfinished_repair(experiment, SCHEDULE).store(3, {}, [torch.ones(2)], [torch.zeros(2)])
    repaired_(experiment, SCHEDULE, Console())
    assert experiment.seen == [3]
    assert "repair: 3 blocks of an interrupted run are continued" in capsys.readouterr().err
    for other in ({"digest": "other"}, {"key": "other"}, {"shrinkage": 0.01}, {"repair_tokens": 256}):
        different = opened(tmp_path, **other)
        repaired_(different, SCHEDULE, Console())
        assert different.seen == [0]
    assert "continued" not in capsys.readouterr().err
    assert unfinished_repair(experiment, Schedule.dense(("layers.0.q",))).blocks == 0
