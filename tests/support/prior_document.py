"""A prior as plain values, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compression import Choice, Schedule, Site
from compression.size import choice_parameters

SITES = tuple(
    Site(f"blocks.{block}.{family}", block, family, *shape)
    for block in range(3)
    for family, shape in (("q", (12, 8)), ("down", (8, 24)))
)
CHI = {"blocks.0.q": 2, "blocks.1.q": 3, "blocks.1.down": 4, "blocks.2.q": 1}


def document(sites: tuple[Site, ...] = SITES, chi: dict[str, int] | None = None) -> dict[str, Any]:
    """A prior as plain values."""
    chis = CHI if chi is None else chi
    entries, choices = [], []
    for site in sites:
        rank = chis.get(site.name)
        choice = Choice("pivoted-lowrank", rank, "two-sided") if rank else Choice("dense", 0, "none")
        choices.append((site.name, choice))
        shape = [site.out_features, site.in_features]
        entry: dict[str, Any] = {"name": site.name, "block": site.block, "family": site.family, "shape": shape}
        entry |= {"topology": choice.topology, "parameters": choice_parameters(site, choice), "offset": 0.1}
        if rank:
            legs = {"out_legs": [site.out_features, 1], "in_legs": [1, site.in_features]}
            entry |= {"chi": rank, "metric": "two-sided", **legs}
        entry["sensitivity"] = {"source": "predicted", "chi": [1, 4], "kl": [0.5, 0.125]}
        entries.append(entry)
    dense = sum(site.parameters for site in sites)
    return {
        "format": "chisel-prior",
        "version": 5,
        "model": {"id": "toy", "digest": "0" * 64, "license": "none"},
        "target_kept": 0.8,
        "kept_fraction": sum(entry["parameters"] for entry in entries) / dense,
        "schedule_digest": Schedule(tuple(choices)).digest,
        "seeds": {"run": 0},
        "sites": entries,
        "scores": [],
        "data": dict.fromkeys(("calibration", "search_text", "heldout_text"), "1" * 64) | {"search_items": []},
        "configuration": {"target_kept": 0.8},
        "environment": {"command": "python search.py", "commit": None},
    }


def written(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "prior.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path
