"""Heal a finished run: repair, heal, measure and store its searched schedule, with resume after an interruption.

Knows run folders and how an experiment is loaded; does not know how healing trains, see `search.healing.training`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from compression.refusal import Refusal
from compression.schedule import Schedule
from compression.sites import put_modules, router_weights
from compression.training.trainable import put_parameters
from search.config import Config, read_fields
from search.evaluation.score import Score
from search.evaluation.workload import Workload
from search.experiment.experiment import Experiment
from search.experiment.open_model import open_model
from search.experiment.repairing import unfinished_repair
from search.healing.plan import HealingOptions, HealingPlan, text_tokens
from search.healing.repaired_start import UNFINISHED, referenced, started_
from search.healing.rows import HealingText
from search.healing.sharding import sharing_copy
from search.healing.state import HEALED, REPAIRED, STATE, write_weights
from search.healing.teacher import output_head
from search.healing.text import heal_text
from search.healing.training import Healed, heal_
from search.model.devices import resolve_device
from search.priors.format import Prior
from search.priors.same_model import refuse_other_model
from search.runtime.console import Console
from search.runtime.distributed import Processes
from search.runtime.memory import give_back_memory
from search.runtime.provenance import environment
from search.runtime.run_digest import refuse_changed
from search.runtime.run_folder import CONFIG, PRIOR, RunFolder, refuse_held, refuse_unwritable
from search.runtime.tensorboard import curves

__all__ = ["HealedRun", "heal_experiment_", "heal_folder", "held", "judge_of"]
_JUDGED = 3000  # tokens


class Measures(Protocol):
    """The part of an evaluator that healing uses."""

    dense: Score

    def score_as_is(self, schedule: Schedule) -> Score:
        """Score the model in its present state; its sites must already be replaced as `schedule` says."""


@dataclass(frozen=True)
class HealedRun:
    """The result of the command `heal`.

    Attributes:
        rows: rows of the table: the dense model, the start of the healing, and the healed model.
        folder: folder of the healed weights.
        stopped: why healing ended early; empty if it did not.
    """

    rows: Sequence[Mapping[str, object]]
    folder: Path
    stopped: str


def heal_folder(run: Path, options: HealingOptions, console: Console) -> HealedRun:
    """Heal the searched schedule of a finished run; continues an interrupted healing with the same settings.

    Processes started together by `accelerate launch` or torchrun share the work; only the first one writes files.

    Raises:
        ValueError: there is no such run, the run or its model has changed since, the settings differ from those of the
            interrupted healing, an option is out of range, or another healing is running in the same folder.
    """
    options.plan(0, torch.device("cpu"))  # refuses an option out of range before anything else is checked
    for name in (CONFIG, PRIOR):
        if not (run / name).is_file():
            raise Refusal(f"heal needs the folder of a finished run, but {run / name} does not exist")
    recorded = refuse_changed(run, console.note)
    config = Config.of_run(read_fields(run / CONFIG), options.trust_remote_code)
    if config.device_map is not None and Processes.wanted() > 1:
        raise Refusal("a run with device_map is healed by one process, which uses all devices; start a single one")
    device = resolve_device(config.device)
    plan = options.plan(config.seed, device)
    folder = Path(options.out) if options.out else run / f"{HEALED}-{options.data_name}-{plan.length}"
    if folder.resolve() == (run / HEALED).resolve():
        raise Refusal(f"out must not be {folder}, which is kept for the healing of the run itself; name another folder")
    if Processes.is_first():
        refuse_unwritable(folder)
        refuse_held(folder)
    with console.stage("load"):
        loaded, sites = open_model(config, device)
        prior = Prior.read(run / PRIOR)
        refuse_other_model(prior, loaded, run, console.note, recorded)
        schedule = prior.schedule
    if all(choice.is_dense for _, choice in schedule):
        raise Refusal(f"the schedule of {run} compresses nothing, so there is nothing to heal")
    output_head(loaded.model)  # refuses a model that cannot be healed
    with console.stage("data"):
        experiment = Experiment.of(config, loaded, sites, device, console.note)
    with held(folder), experiment.evaluator("heldout") as evaluator:
        evaluator.close()
        scores, healed = heal_experiment_(
            experiment, schedule, evaluator, plan, options, folder, console, run / REPAIRED, keep=False
        )
    rows = [score.to_row(name) for name, score in scores.items()]
    return HealedRun(rows, folder, healed.stopped)


def held(folder: Path) -> AbstractContextManager[object]:
    """Lock the folder of a healing; among processes that share the work, only the first one takes the lock."""
    return RunFolder(folder) if Processes.is_first() else nullcontext()


def heal_experiment_(
    experiment: Experiment,
    schedule: Schedule,
    evaluator: Measures,
    plan: HealingPlan | None,
    options: HealingOptions,
    folder: Path,
    console: Console,
    repaired: Path | None = None,
    keep: bool = True,
) -> tuple[dict[str, Score], Healed]:
    """Repair, heal and measure a schedule; the model of the experiment is dense again afterwards.

    Repair is discarded if it raises the KL on the selection text by more than one standard error of the paired
    difference. No trial, repair or table uses that text. Repair can do harm when calibration text is short: the search
    chose a schedule that works well without repair, and repair learns its corrections from few tokens, all of equal
    weight.

    Args:
        evaluator: an evaluator on the held-out text, already closed, so that its model is dense.
        plan: the settings of the healing; None only repairs.
        folder: receives the healed weights and, until healing is finished, its checkpoints.
        repaired, keep: as for `search.healing.repaired_start.started_`.

    Returns:
        The scores by row name and the outcome of the healing. The rows are "dense"; the start of the healing, named
        "repaired", or "searched" if there was no repair or it was discarded; and "healed" if there is a plan.
    """
    model = experiment.loaded.model
    if plan is not None and plan.loss == "labels":
        experiment.loaded.must_continue_text("loss labels")
    scores, healed = {"dense": evaluator.dense}, Healed(())
    dense = sharing_copy(model)
    # Training replaces norms, biases and routers, so they have to be put back at the end.
    routers = router_weights(dense)
    vectors = {name: p for name, p in dense.named_parameters() if p.ndim == 1 or name in routers}
    resumable = None if plan is None else folder / f"{UNFINISHED}-{schedule.digest[:12]}"
    text = None
    if plan is not None:
        with console.stage("text"):  # of the dense model, if it is sampled, and before a repair that takes minutes
            tokens = text_tokens(plan, experiment.device, options)
            text = heal_text(experiment.loaded, options.data, options.row_tokens, plan.seed, tokens)
        if text.left_out:
            console.note(f"{text.left_out} documents are not learned from: they overlap with the reported data")
    with Processes().first_alone():
        taken, name = started_(experiment, schedule, dense, resumable, console, repaired, keep)
    unfinished_repair(experiment, schedule).drop()  # its result is stored, or is not wanted
    first = Processes.is_first()
    try:
        scores[name] = evaluator.score_as_is(schedule)
        if plan is not None and resumable is not None and text is not None:
            judge = judge_of(experiment, dense)
            with console.stage("heal", plan.tokens, "tokens") as stage, curves(folder if first else None) as drawn:
                healed = heal_(model, dense, text, judge, plan, resumable, stage, console.note, drawn)
            give_back_memory()  # what training took
            scores["healed"] = evaluator.score_as_is(schedule)
            if first:
                document = _document(experiment, schedule, plan, options, text, healed, scores)
                write_weights(folder, STATE, model, experiment.sites, document)
                shutil.rmtree(resumable, ignore_errors=True)
            if outlook := healed.outlook():
                console.note(f"healing: {outlook}")
    finally:
        put_modules(model, taken)
        put_parameters(model, vectors)
        experiment.calibration.release()
    return scores, healed


def judge_of(experiment: Experiment, dense: nn.Module) -> Workload:
    """A workload of search text and questions that selects the best state of a healing.

    Healing does not learn from this text, and no result is reported on it.
    """
    return referenced(Workload(experiment.mixture(_JUDGED), dense), dense)


def _document(
    experiment: Experiment,
    schedule: Schedule,
    plan: HealingPlan,
    options: HealingOptions,
    text: HealingText,
    healed: Healed,
    scores: Mapping[str, Score],
) -> dict[str, Any]:
    """The content of healing.json: what the healed weights belong to and how they were made."""
    return {
        "model": {"id": experiment.loaded.model_id, "digest": experiment.loaded.digest},
        "schedule": json.loads(schedule.to_json()),
        "plan": dataclasses.asdict(plan),
        "data": {
            "source": options.data,
            "rows": len(text),
            "row_tokens": options.row_tokens,
            "left_out": text.left_out,
        },
        "looks": [dataclasses.asdict(measured) for measured in healed.measurements],
        "tokens_per_second": healed.tokens_per_second,
        "stopped": healed.stopped,
        "outlook": healed.outlook(),
        "rows": [score.to_row(name) for name, score in scores.items()],
        "environment": environment(),
    }
