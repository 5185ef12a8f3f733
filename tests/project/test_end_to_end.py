"""The real default model: how it is loaded and scored, and, with its first blocks, the whole job and repair.

The job runs through the command line of a checkout. Eight of the thirty blocks have real weights, text and questions in
a third of the time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compression.decomposition.apply import ScheduleApplier
from compression.decomposition.repair import repair_
from compression.schedule import DENSE, Schedule
from search.config import Config, read_fields
from search.evaluation.workload import Workload
from search.experiment.experiment import Experiment
from search.model.loading import load_model
from search.priors.format import Prior
from search.runtime.run_folder import CONFIG, PRIOR

ROOT = Path(__file__).parents[2]
BLOCKS = 8
SMALL = {"search_text_tokens": 64, "search_items": 1, "search_shards": 1, "heldout_tokens": 256, "report_items": 3}
pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_the_default_model_has_its_published_size_and_reads_prose() -> None:
    experiment = Experiment.open(Config(calibration_tokens=512, **SMALL))  # type: ignore[arg-type]
    model = experiment.loaded.model
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert len(experiment.sites) == 210
    judge = Workload(experiment.shards("heldout")[0], model)
    judge.reference(model)
    dense = judge.measure(model)
    assert dense.kl == pytest.approx(0, abs=1e-6)
    assert dense.perplexity is not None
    assert 20 < dense.perplexity < 60


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, str]:
    """The folder of a finished job, the document that it printed, and its messages."""
    home = tmp_path_factory.mktemp("job")
    folder, first = home / "a run é", home / "first blocks"
    loaded = load_model("default", "cpu", torch.float32)
    model = loaded.model
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:BLOCKS], BLOCKS
    model.config.layer_types = None
    model.save_pretrained(first)
    loaded.tokenizer.save_pretrained(first)
    command = [sys.executable, str(ROOT / "search.py"), "--quick", "--budget", "6", "--out", str(folder), "--json"]
    command += ["--model", str(first), "--calibration-tokens", "512", "--repair-tokens", "0", "--heal-minutes", "0.2"]
    for name, value in SMALL.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    command += ["--benchmark-items", "2", "--dtype", "float32"]  # in bfloat16 any change costs 0.002 nats
    done = subprocess.run(command, capture_output=True, text=True, timeout=2400, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), done.stderr


def test_the_real_job_ends_with_a_table_in_which_allocation_beats_uniform(job: tuple[Path, Any, str]) -> None:
    folder, document, said = job
    rows = {row["schedule"]: row for row in document["rows"]}
    names = ["dense", "uniform-plain", "uniform-whitened", "uniform", "lagrangian", "searched", "healed"]
    assert list(rows) == names
    assert document["trials"] == 3  # one with slopes, which is charged for as four, and two without
    assert rows["dense"]["kl"] == pytest.approx(0, abs=1e-6)
    for name in list(rows)[1:]:
        assert 0.799 < rows[name]["kept_fraction"] <= 0.8
    assert rows["uniform-plain"]["kl"] > 2 * rows["uniform"]["kl"]
    assert rows["lagrangian"]["kl"] < 0.75 * rows["uniform"]["kl"]
    assert rows["lagrangian"]["kl"] < 0.75 * rows["uniform-whitened"]["kl"]
    assert rows["healed"]["kl"] < rows["searched"]["kl"]
    assert document["latency"]["prefill_ratio"] > 0
    assert (folder / "prior.json").is_file()
    assert (folder / "hf" / "model.safetensors").is_file()
    assert len((folder / "benchmarks.csv").read_text(encoding="utf-8").splitlines()) == 1 + 5 * 8
    assert "search" in said


def test_repair_lowers_the_divergence_of_the_first_block_of_the_real_model(job: tuple[Path, Any, str]) -> None:
    folder, _, _ = job
    experiment = Experiment.open(Config.of(read_fields(folder / CONFIG) | {"calibration_tokens": 1024}))
    model, store = experiment.loaded.model, experiment.store
    sites = tuple(site for site in experiment.sites if site.block < 1)
    names = {site.name for site in sites}
    schedule = Prior.read(folder / PRIOR).schedule
    schedule = Schedule(tuple((name, choice if name in names else DENSE) for name, choice in schedule))
    judge = Workload(experiment.shards("selection")[0], experiment.loaded.model)
    judge.reference(model)
    with ScheduleApplier(model, store) as applier:
        applier.apply_(schedule)
        decomposed = judge.measure(model).kl
    batches = experiment.repair_batches(1024)
    repair_(
        *(model, sites, schedule, experiment.calibration(), batches),
        *(experiment.calibration.shrinkage, store.bonds.elimination),
    )
    repaired = judge.measure(model).kl
    assert decomposed is not None
    assert repaired is not None
    assert repaired < decomposed
