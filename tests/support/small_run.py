"""The flags of a run on a tiny model, small enough for a test: without repair and healing.

`HEAL` adds a short repair and a healing of a few steps, for tests that concern them; the table then has two more rows.
"""

from __future__ import annotations

SMALL = {
    "model": "random:tiny-llama",
    "device": "cpu",
    "agent": "reinforce",
    "budget": 6,
    "target_kept": 0.7,
    "calibration_tokens": 1500,
    "search_items": 2,
    "search_text_tokens": 128,
    "heldout_tokens": 600,
    "report_items": 6,
    "repair_tokens": 0,
    "heal_minutes": 0,
    "benchmark_items": 0,
    "export": "none",
}
NAMES = ["dense", "uniform-plain", "uniform-whitened", "uniform", "lagrangian", "searched"]
HEALED = [*NAMES, "repaired", "healed"]
HEAL = {"repair_tokens": 512, "heal_minutes": 0.01}


def words(**changes: object) -> list[str]:
    values = {**SMALL, **changes}
    flags = [(f"--{name.replace('_', '-')}", str(value)) for name, value in values.items() if value is not None]
    return [word for pair in flags for word in pair] + ["--quiet"]
