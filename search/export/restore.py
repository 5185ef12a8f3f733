"""Restores the compressed model of a finished run from the run's folder.

Of the weights, a run folder keeps only the repaired and healed ones. Anything else is decomposed again from the dense
model and the cached statistics, as the prior and the configuration say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from compression.decomposition.apply import ScheduleApplier
from compression.refusal import Refusal
from compression.schedule import Schedule
from search.config import Config, read_fields
from search.evaluation.workload import Workload
from search.experiment.experiment import Experiment, load
from search.experiment.preparation import calibrate
from search.healing.repaired_start import stored_repair
from search.healing.state import HEALED, REPAIRED, STATE, StoredWeights
from search.model.devices import resolve_device
from search.priors.format import Prior
from search.runtime.console import Console
from search.runtime.run_folder import CONFIG, PRIOR, SUMMARY

__all__ = ["STATES", "RestoredRun", "restore"]

STATES = ("healed", "repaired", "searched")
"""The states of a run's model, latest first: trained, repaired block by block, or as decomposed after the search."""


@dataclass(frozen=True, eq=False)
class RestoredRun:
    """The compressed model of a run.

    Attributes:
        experiment: the experiment of the run; its model is the compressed one.
        schedule: the schedule that the run chose.
        state: state of the model, one of `STATES`; also the name of its row in the run's table.
        prior: the run's prior.
        summary: content of summary.json; empty if there is no such file.
        workload: held-out text and report items with the dense model's results as reference; None unless `restore`
            was called with `reference`.
    """

    experiment: Experiment
    schedule: Schedule
    state: str
    prior: Prior
    summary: Mapping[str, object]

    workload: Workload | None = None

    @property
    def document(self) -> Mapping[str, object]:
        """The prior as plain JSON values."""
        return self.prior.model_dump(mode="json")


def restore(
    run: Path,
    console: Console,
    device: str = "auto",
    state: str | None = None,
    healed: Path | None = None,
    reference: bool = False,
    opened: Experiment | None = None,
    trusted: bool = False,
) -> RestoredRun:
    """Load the dense model of a run and compress it as the run did.

    Args:
        run: folder of the run.
        state: one of `STATES`; None takes the furthest state that the run reached. "repaired" is also possible if the
            run discarded its repair.
        healed: folder of a healing; None takes the run's own healing.
        opened: the experiment of this run with its dense model, if it is in memory already; it is compressed in place.
        reference: evaluate the dense model on the held-out workload first, so that the restored model can be measured
            against it.
        trusted: whether the code that comes with the model may run, if the run used it.

    Raises:
        ValueError: `run` is not the folder of a finished run, its model is another one today, or it does not have the
            state that was asked for.
        DataUnavailable: the model or the data cannot be obtained.
    """
    if not (run / PRIOR).is_file() or not (run / CONFIG).is_file():
        raise Refusal(f"a finished run has {CONFIG} and {PRIOR}, but {run} does not; give the folder of a finished run")
    own: dict[str, object] = {"device": device} if device == "auto" else {"device": device, "device_map": None}
    config = Config.of_run(read_fields(run / CONFIG), trusted, **own)
    prior, summary = Prior.read(run / PRIOR), read_fields(run / SUMMARY) if (run / SUMMARY).is_file() else {}
    schedule = prior.schedule
    state = _state(run, config, prior, state, healed)
    kept = StoredWeights.read(healed or run / HEALED) if state == "healed" else None
    where = resolve_device(device)
    if opened is None:
        with console.stage("load"):
            loaded, sites = load(config, where)
    else:
        loaded, sites = opened.loaded, opened.sites
    if prior.model.id != loaded.model_id:
        raise Refusal(f"the run in {run} compressed {prior.model.id}, not {loaded.model_id}")
    if prior.model.digest != loaded.digest:
        console.note("the weights, or their dtype on this machine, differ from those that the run measured")
    experiment = opened or Experiment.of(config, loaded, sites, where, console.note)
    workload = None
    if reference:
        with console.stage("reference"):
            workload = Workload(experiment.shards("heldout")[0], where)
            workload.reference(loaded.model)
    if kept is not None:
        kept.check(schedule, loaded.digest)
        kept.put_(loaded.model, sites, schedule)
        return RestoredRun(experiment, schedule, state, prior, summary, workload)
    if state == "repaired" and (stored := stored_repair(run / REPAIRED, experiment, schedule)) is not None:
        stored.put_(loaded.model, sites, schedule)
        return RestoredRun(experiment, schedule, state, prior, summary, workload)
    calibrate(experiment, console)
    if state == "repaired":
        with console.stage("repair", 1 + max(site.block for site in sites), "blocks") as stage:
            experiment.repair_(schedule, config.repair_tokens, lambda done: stage.advance(1))
    else:
        with console.stage("compress"):
            ScheduleApplier(loaded.model, experiment.store, packed=True).apply_(schedule)
    return RestoredRun(experiment, schedule, state, prior, summary, workload)


def _state(run: Path, config: Config, prior: Prior, wanted: str | None, healed: Path | None) -> str:
    """Return the state that is wanted, or the furthest one that the run reached.

    "repaired" is also accepted where the run measured no repair but has what it takes to repeat one.
    """
    has = {
        "healed": healed is not None or (run / HEALED / STATE).is_file(),
        "repaired": prior.was_repaired,
        "searched": True,
    }
    if wanted is None:
        return next(name for name in STATES if has[name])
    if wanted not in STATES:
        raise Refusal(f"state must be one of {', '.join(STATES)}, got {wanted!r}")
    can_be_repaired = bool(config.repair_tokens) and any(not choice.is_dense for _, choice in prior.schedule)
    if not has[wanted] and not (wanted == "repaired" and can_be_repaired):
        raise Refusal(f"state must be one that the run has, and {run} was not {wanted}")
    return wanted
