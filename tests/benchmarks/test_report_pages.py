"""Where benchmarks keep their reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import report


def test_a_report_is_named_after_module_variant_and_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = report.environment()
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for gpus in ([], ["NVIDIA H200"]):
        monkeypatch.setattr(report, "environment", lambda gpus=gpus: {**facts, "gpus": gpus})
        for variant in ("", "130-minutes"):
            report.publish("benchmarks.heal_speed", "Title", "body", [], True, variant)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "heal_speed-130-minutes-nvidia-h200.md",
        "heal_speed-130-minutes.md",
        "heal_speed-nvidia-h200.md",
        "heal_speed.md",
    ]
    report.publish("benchmarks.decompose", "Title", "body", [], False)
    assert not (tmp_path / "decompose.md").exists()
