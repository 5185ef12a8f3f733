"""The model of a finished run, made again from its folder: the compressed model that the run measured.

Of weights a run folder keeps only the healed ones; the prior and the configuration give the others back from the dense
model and the cached statistics.
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
"""What a run makes of a model, the last one first: trained, solved block by block, or as it was decomposed."""


@dataclass(frozen=True, eq=False)
class RestoredRun:
    """A run's compressed model.

    Attributes:
        experiment: with the compressed model in place of the dense one.
        schedule: the run's result.
        state: the row of the run's table that this model is, one of `STATES`.
        prior: of the run.
        summary: the content of summary.json.
        workload: held-out text and report items, referenced to the dense model, where that was asked for.
    """

    experiment: Experiment
    schedule: Schedule
    state: str
    prior: Prior
    summary: Mapping[str, object]

    workload: Workload | None = None

    @property
    def document(self) -> Mapping[str, object]:
        """The prior as plain values."""
        return self.prior.model_dump(mode="json")


def restore(
    run: Path,
    console: Console,
    device: str = "auto",
    state: str | None = None,
    healed: Path | None = None,
    reference: bool = False,
    opened: Experiment | None = None,
) -> RestoredRun:
    """Load the dense model of a run and make it what the run made of it.

    Args:
        state: one of `STATES`; by default the last one that the run has. A repair that it left out can be asked for.
        healed: folder of a healing; by default that of the run itself.
        opened: the experiment of this run with its dense model, if it is in memory already.
        reference: read the held-out workload with the dense model, so that what becomes of it can be measured.

    Raises:
        ValueError: no run folder or one without a result, whose model is another one now, or a state that it has not.
        DataUnavailable: model or data cannot be had.
    """
    if not (run / PRIOR).is_file() or not (run / CONFIG).is_file():
        raise Refusal(f"a finished run has {CONFIG} and {PRIOR}, and {run} has not; name its folder")
    config = Config.of({**read_fields(run / CONFIG), "device": device})
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
        raise Refusal(f"the run in {run} is of another model than {loaded.model_id}")
    if prior.model.digest != loaded.digest:
        console.note("weights, or their number type on this machine, are not those that the run measured")
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
    """The state that is wanted, or the last one that the run has; repaired can be what it has not measured, too."""
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
