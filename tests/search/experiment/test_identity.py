"""What a search measures is part of its identity, so that another measure does not go on with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fake_data import fake_data
from small_run import SMALL

from compression.sites import discover_sites
from search.config import Config
from search.experiment.experiment import Experiment
from search.model.loading import load_model
from search.trials.setup import fingerprint_defaults

__all__ = ["fake_data"]


@pytest.mark.usefixtures("fake_data")
@pytest.mark.parametrize(("subject", "changed"), [({"subject": "law"}, True), ({}, False)])
def test_only_a_search_whose_questions_have_instructions_differs_from_one_of_an_earlier_version(
    subject: dict[str, str], changed: bool, tmp_path: Path
) -> None:
    rows = [{"question": f"Which is {n}?", "choices": ["x", "y"], "answer": n % 2, **subject} for n in range(80)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_model("random:tiny-llama", "cpu")
    config = Config.of({**SMALL, "proxy": str(tmp_path / "own.jsonl")})
    opened = Experiment.of(config, loaded, discover_sites(loaded.model), torch.device("cpu"))
    assert (opened.identity["kl_counts"] != fingerprint_defaults()["kl_counts"]) == changed
    assert any(item.uncounted for item in opened.shards("search")[0]) == changed
