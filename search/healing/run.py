"""The healing of a run: its searched schedule repaired, healed, measured and written, resumably.

Knows run folders and how a subject is loaded; how healing works stands in `search.healing.training`.
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
from compression.sites import put_modules
from compression.training.trainable import put_parameters
from search.config import Config, read_fields
from search.evaluation.score import Score
from search.evaluation.workload import Workload
from search.experiment.experiment import Experiment, load
from search.healing.plan import HealingPlan, Options, text_tokens
from search.healing.repaired_start import UNFINISHED, referenced, started_
from search.healing.rows import HealingText
from search.healing.sharding import sharing_copy
from search.healing.state import HEALED, REPAIRED, STATE, write_weights
from search.healing.text import heal_text
from search.healing.training import Healed, heal_
from search.model.devices import resolve_device
from search.priors.format import Prior
from search.runtime.console import Console
from search.runtime.distributed import Processes
from search.runtime.provenance import environment
from search.runtime.run_folder import CONFIG, PRIOR, RunFolder, refuse_held
from search.runtime.tensorboard import curves

__all__ = ["HealedRun", "heal_experiment_", "heal_folder", "held", "judge_of"]
_JUDGED = 3000  # tokens


class Measures(Protocol):
    """What healing needs of an evaluator."""

    dense: Score

    def score_as_is(self, schedule: Schedule) -> Score:
        """Of the model as it stands, its sites replaced as the schedule says."""


@dataclass(frozen=True)
class HealedRun:
    """What the command ends with: the table before and after, and where the weights are."""

    rows: Sequence[Mapping[str, object]]
    folder: Path
    stopped: str


def heal_folder(run: Path, options: Options, console: Console) -> HealedRun:
    """Heal the searched schedule of a finished run; continues an interrupted healing of the same settings.

    Several processes that `accelerate launch` or torchrun started share the work; the first one writes.

    Raises:
        ValueError: no such run, its model or settings differ from now, an option out of range, or a healing in the
            same folder that is under way.
    """
    options.plan(0, torch.device("cpu"))  # an option out of range is refused whatever the folder is
    for name in (CONFIG, PRIOR):
        if not (run / name).is_file():
            raise Refusal(f"heal needs the folder of a finished run, but there is no {run / name}")
    config = Config.of(read_fields(run / CONFIG))
    device = resolve_device(config.device)
    plan = options.plan(config.seed, device)
    folder = Path(options.out) if options.out else run / f"{HEALED}-{options.data_name}-{plan.length}"
    if Processes.is_first():
        refuse_held(folder)
    with console.stage("load"):
        loaded, sites = load(config, device)
        prior = Prior.read(run / PRIOR)
        if prior.model.digest != loaded.digest:
            raise Refusal(
                f"{run / PRIOR} is of another model, with digest {prior.model.digest[:12]}; the one of this run has "
                f"{loaded.digest[:12]}"
            )
        schedule = prior.schedule
    if all(choice.is_dense for _, choice in schedule):
        raise Refusal(f"the schedule of {run} compresses nothing, so that there is nothing to heal")
    with console.stage("data"):
        experiment = Experiment.of(config, loaded, sites, device, console.note)
    with held(folder), experiment.evaluator("heldout") as evaluator:
        evaluator.close()
        scores, healed = heal_experiment_(
            experiment, schedule, evaluator, plan, options, folder, console, run / REPAIRED
        )
    rows = [score.to_row(name) for name, score in scores.items()]
    return HealedRun(rows, folder, healed.stopped)


def held(folder: Path) -> AbstractContextManager[object]:
    """The lock of a healing's folder; of processes that share the work the first one takes it for all."""
    return RunFolder(folder) if Processes.is_first() else nullcontext()


def heal_experiment_(
    experiment: Experiment,
    schedule: Schedule,
    evaluator: Measures,
    plan: HealingPlan | None,
    options: Options,
    folder: Path,
    console: Console,
    repaired: Path | None = None,
) -> tuple[dict[str, Score], Healed]:
    """Repair, heal and measure a schedule; the model of the subject is dense again afterwards.

    Repair is kept unless it clearly raises the KL (by more than a standard error, paired) on the selection set, which
    no trial, no repair and no table reads. On little text it can: a search has found what goes well together
    unrepaired, and corrections are learned from few tokens, all counted alike.

    Args:
        evaluator: measures the model of the subject as it stands; of held-out data, closed: its model dense.
        plan: None repairs only.
        folder: receives the weights, the state and, while it lasts, what a later try continues from.
        repaired: folder that keeps the repaired weights and gives those of an earlier repair; None keeps none.

    Returns:
        The scores of the dense model, of what healing starts from, named "repaired", or "searched" where there was no
        repair or it was not kept, and of the healed one; and how healing went.
    """
    model = experiment.loaded.model
    scores, healed = {"dense": evaluator.dense}, Healed(())
    dense = sharing_copy(model)
    # Norms and biases, which training replaces.
    vectors = {name: p for name, p in dense.named_parameters() if p.ndim == 1}
    resumable = None if plan is None else folder / f"{UNFINISHED}-{schedule.digest[:12]}"
    with Processes().first_alone():
        taken, name = started_(experiment, schedule, dense, resumable, console, repaired)
    first = Processes.is_first()
    try:
        scores[name] = evaluator.score_as_is(schedule)
        if plan is not None and resumable is not None:
            with console.stage("text"):
                tokens = text_tokens(plan, experiment.device, options)
                text = heal_text(experiment.loaded, options.data, options.row_tokens, plan.seed, tokens)
            if text.left_out:
                console.note(f"{text.left_out} documents left out of the text: they share words with what is reported")
            judge = judge_of(experiment, dense)
            with console.stage("heal", plan.tokens, "tokens") as stage, curves(folder if first else None) as drawn:
                healed = heal_(model, dense, text, judge, plan, resumable, stage, console.note, drawn)
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
    """Search texts and questions, which healing is steered by: neither learned from nor reported on."""
    return referenced(Workload(experiment.mixture(_JUDGED), experiment.device), dense)


def _document(
    experiment: Experiment,
    schedule: Schedule,
    plan: HealingPlan,
    options: Options,
    text: HealingText,
    healed: Healed,
    scores: Mapping[str, Score],
) -> dict[str, Any]:
    """What the healed state is of, and how it came about."""
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
