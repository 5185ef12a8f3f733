"""The real job with a small budget on the real default model, through the command line of a checkout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.e2e
@pytest.mark.slow
def test_the_real_job_ends_with_a_table_in_which_allocation_beats_uniform(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "search.py"), "--quick", "--budget", "6", "--out", str(tmp_path / "a run é")]
    small = ["--repair-tokens", "2048", "--heal-minutes", "0.2", "--benchmark-items", "2"]
    small += ["--search-text-tokens", "128", "--heldout-tokens", "512", "--report-items", "6"]
    done = subprocess.run(
        [*command, *small, "--json"],
        capture_output=True,
        text=True,
        timeout=2400,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    rows = {row["schedule"]: row for row in document["rows"]}
    names = ["dense", "uniform-plain", "uniform-whitened", "uniform", "lagrangian", "searched", "repaired", "healed"]
    assert list(rows) == names
    assert document["trials"] == 3  # one with slopes, which is charged for as four, and two without
    assert rows["dense"]["parameters"] == 134_515_008
    assert rows["dense"]["kl"] == pytest.approx(0, abs=1e-6)
    assert 20 < rows["dense"]["perplexity"] < 60
    for name in list(rows)[1:]:
        assert 0.799 < rows[name]["kept_fraction"] <= 0.8
    assert rows["uniform-plain"]["kl"] > 5
    assert rows["lagrangian"]["kl"] < rows["uniform"]["kl"] / 2
    assert rows["lagrangian"]["kl"] < rows["uniform-whitened"]["kl"] / 2.5
    assert rows["repaired"]["kl"] < rows["searched"]["kl"]
    assert rows["healed"]["kl"] < rows["searched"]["kl"]
    assert document["latency"]["prefill_ratio"] > 0
    assert (tmp_path / "a run é" / "prior.json").is_file()
    assert (tmp_path / "a run é" / "hf" / "model.safetensors").is_file()
    lines = (tmp_path / "a run é" / "benchmarks.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 5 * 8
    assert "search" in done.stderr
    assert "left" in done.stderr
