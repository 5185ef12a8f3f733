"""Prepare the model that healing starts from: apply the schedule, repair it, and undo the repair if it does harm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from compression.decomposition.apply import ScheduleApplier
from compression.refusal import Refusal
from compression.schedule import Schedule
from compression.sites import put_modules
from search.config import EARLIER
from search.evaluation.quality import Quality, paired_kl
from search.evaluation.workload import Workload
from search.experiment.experiment import Experiment
from search.experiment.repairing import repaired_
from search.healing.state import REPAIR, StoredWeights, load_sites_, site_tensors, write_weights
from search.runtime.checkpoints import Checkpoint, Checkpoints
from search.runtime.console import Console
from search.runtime.distributed import Processes

__all__ = ["UNFINISHED", "referenced", "repair_did_harm", "started_"]

UNFINISHED, _START = "unfinished", "start"


def referenced(judge: Workload, dense: nn.Module) -> Workload:
    """Take `dense` as the reference of `judge`; returns `judge`."""
    judge.reference(dense)
    return judge


def started_(
    experiment: Experiment,
    schedule: Schedule,
    dense: nn.Module,
    folder: Path | None,
    console: Console,
    repaired: Path | None = None,
    keep: bool = True,
) -> tuple[Mapping[str, nn.Module], str]:
    """Turn the dense model in place into the start of a healing: decomposed, and repaired unless repair does harm.

    Args:
        folder: stores this start until the healing is finished. If an interrupted healing left its start there, that
            one is loaded instead. None stores nothing.
        repaired: folder of the repaired weights of the run. If it holds the result of the same repair, that is loaded.
        keep: store the repaired weights in `repaired`; false for a run that has finished, whose files must not change.

    Returns:
        The modules that were replaced, by name, and the name of the resulting model's row in the final table,
        "repaired" or "searched".
    """
    model = experiment.loaded.model
    sites = [site for site in experiment.sites if not site.dense_because]
    taken: Mapping[str, nn.Module]
    kept = None if folder is None else Checkpoints(folder / _START)
    if kept is not None:

        def take(found: Checkpoint) -> tuple[Mapping[str, nn.Module], str]:
            return load_sites_(model, sites, schedule, found.tensors), found.state["row"]

        if (loaded := kept.newest(take, console.note)) is not None:
            return loaded
    if experiment.config.repair_tokens and (stored := stored_repair(repaired, experiment, schedule)) is not None:
        taken, name = load_sites_(model, sites, schedule, stored.tensors), "repaired"
    else:
        taken, name = _decomposed_(experiment, schedule), "searched"
        if experiment.config.repair_tokens:
            taken, name = _repaired_(experiment, schedule, taken, dense, console)
            if repaired is not None and keep and Processes.is_first():
                shutil.rmtree(repaired, ignore_errors=True)
                if name == "repaired":
                    write_weights(repaired, REPAIR, model, experiment.sites, _made_for(experiment, schedule))
    if kept is not None and Processes.is_first():
        kept.save(Checkpoint(0, site_tensors(model, sites), {"row": name}))
    return taken, name


def stored_repair(folder: Path | None, experiment: Experiment, schedule: Schedule) -> StoredWeights | None:
    """The repaired weights in `folder` if they are intact and a new repair would give the same; otherwise None."""
    if folder is None or not (folder / REPAIR).is_file():
        return None
    try:
        stored = StoredWeights.read(folder, REPAIR)
    except Refusal:
        return None
    made_for, written = _made_for(experiment, schedule), {**EARLIER, **stored.document}
    return stored if all(written.get(name) == value for name, value in made_for.items()) else None


def _made_for(experiment: Experiment, schedule: Schedule) -> dict[str, object]:
    """Everything that determines the result of a repair, as plain JSON values."""
    return {
        "model": {"id": experiment.loaded.model_id, "digest": experiment.loaded.digest},
        "schedule": json.loads(schedule.to_json()),
        "statistics": experiment.calibration.key,
        "shrinkage": experiment.config.shrinkage,
        "repair_tokens": experiment.config.repair_tokens,
    }


def _decomposed_(experiment: Experiment, schedule: Schedule) -> Mapping[str, nn.Module]:
    """Put the factors of a schedule into the dense model; returns the modules they replace."""
    model = experiment.loaded.model
    applier = ScheduleApplier(model, experiment.store, packed=True)
    taken = {name: model.get_submodule(name) for name, choice in schedule if not choice.is_dense}
    applier.apply_(schedule)
    return taken


def _repaired_(
    experiment: Experiment, schedule: Schedule, taken: Mapping[str, nn.Module], dense: nn.Module, console: Console
) -> tuple[Mapping[str, nn.Module], str]:
    """Repair the model unless that does harm; returns the same as `started_`.

    Args:
        taken: the dense modules that the factors of the schedule replaced.
    """
    model = experiment.loaded.model
    with console.stage("judge", 2, "passes") as stage:
        judge = referenced(Workload(experiment.shards("selection")[0], dense), dense)
        stage.advance(1)
        before = judge.measure(model)
        put_modules(model, taken)
    taken = repaired_(experiment, schedule, console)
    after = judge.measure(model)
    if not repair_did_harm(after, before):
        return taken, "repaired"
    put_modules(model, taken)
    console.note(
        f"repair is discarded: on the selection text, which no trial used, it changes KL from {before.kl:.4f} to "
        f"{after.kl:.4f} nats/token"
    )
    return _decomposed_(experiment, schedule), "searched"


def repair_did_harm(repaired: Quality, before: Quality) -> bool:
    """Whether repair made the model worse.

    It did if it raises the KL by more than one standard error of the paired difference, or if the repaired model
    gives non-finite logits and the unrepaired one does not.
    """
    if repaired.state != "ok" or before.state != "ok":
        return before.state == "ok"
    difference = paired_kl(repaired, before)
    return difference.value > difference.standard_error
