"""Restores the compressed model of a finished run from the run's folder.

Of the weights, a run folder keeps only the repaired and healed ones. Anything else is decomposed again from the dense
model and the cached statistics, as the prior and the configuration say.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression.decomposition.apply import ScheduleApplier
from compression.refusal import Refusal
from compression.schedule import Schedule
from compression.sites import put_modules
from search.config import Config, read_fields
from search.evaluation.workload import Workload
from search.experiment.experiment import Experiment
from search.experiment.open_model import open_model
from search.experiment.preparation import calibrate
from search.experiment.repairing import repaired_, unfinished_repair
from search.healing.repaired_start import stored_repair
from search.healing.state import HEALED, REPAIRED, STATE, StoredWeights
from search.model.devices import resolve_device
from search.priors.format import Prior
from search.priors.same_model import refuse_other_model
from search.reporting.documents import SummaryFile, document
from search.runtime.console import Console
from search.runtime.run_digest import refuse_changed
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
        measured: row of a table that was measured on these weights; None if there is none.
        workload: held-out text and report items with the dense model's results as reference; None unless `restore`
            was called with `reference`.
    """

    experiment: Experiment
    schedule: Schedule
    state: str
    prior: Prior
    summary: Mapping[str, object]
    measured: Mapping[str, object] | None
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
    reference: bool | None = False,
    opened: Experiment | None = None,
    check: Callable[[Any, Any], None] = lambda model, tokenizer: None,
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
            against it; None does so if no row was measured for this state.
        check: called with the dense model and its tokenizer before anything is computed; it may refuse them.
        trusted: whether the code that comes with the model may run, if the run used it.

    Raises:
        ValueError: `run` is not the folder of a finished run, it was changed since it finished, its model is another
            one today, or it does not have the state that was asked for.
        DataUnavailable: the model or the data cannot be obtained.
    """
    if not (run / PRIOR).is_file() or not (run / CONFIG).is_file():
        raise Refusal(f"a finished run has {CONFIG} and {PRIOR}, but {run} does not; give the folder of a finished run")
    recorded = refuse_changed(run, console.note)
    own: dict[str, object] = {"device": device} if device == "auto" else {"device": device, "device_map": None}
    config = Config.of_run(read_fields(run / CONFIG), trusted, **own)
    prior = Prior.read(run / PRIOR)
    summary = document(SummaryFile, run / SUMMARY, "the summary") if (run / SUMMARY).exists() else {}
    schedule, rows = prior.schedule, _rows(summary)
    if prior.schedule_digest is None and rows:
        raise Refusal(
            f"{run / PRIOR} was edited by hand, so that the table of the run belongs to another schedule; use the "
            "prior with search.py apply"
        )
    state = _state(run, config, prior, state, healed, {row.get("schedule") for row in rows})
    kept = StoredWeights.read(healed or run / HEALED) if state == "healed" else None
    measured = _measured({} if kept is not None and healed is not None else summary, state, kept)
    where = resolve_device(device)
    if opened is None:
        with console.stage("load"):
            loaded, sites = open_model(config, where)
    else:
        loaded, sites = opened.loaded, opened.sites
    check(loaded.model, loaded.tokenizer)
    refuse_other_model(prior, loaded, run, console.note, recorded)
    experiment = opened or Experiment.of(config, loaded, sites, where, console.note)
    workload = None
    if reference or (reference is None and measured is None):
        with console.stage("reference"):
            workload = Workload(experiment.shards("heldout")[0], loaded.model)
            workload.reference(loaded.model)
    ends = experiment.stored_ends()
    if kept is not None:
        kept.check(schedule, loaded.digest)
        kept.put_(loaded.model, sites, schedule)
    elif state == "repaired" and (stored := stored_repair(run / REPAIRED, experiment, schedule)) is not None:
        stored.put_(loaded.model, sites, schedule)
    else:
        calibrate(experiment, console)
        if state == "repaired":
            repaired_(experiment, schedule, console)
            unfinished_repair(experiment, schedule).drop()
        else:
            with console.stage("compress"):
                ScheduleApplier(loaded.model, experiment.store, packed=True).apply_(schedule)
    put_modules(loaded.model, ends)
    return RestoredRun(experiment, schedule, state, prior, summary, measured, workload)


def _rows(document: Mapping[str, Any]) -> list[Mapping[str, object]]:
    """The rows of the table in summary.json or healing.json."""
    rows = document.get("rows")
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []


def _measured(summary: Mapping[str, object], state: str, kept: StoredWeights | None) -> Mapping[str, object] | None:
    """The row that was measured on the weights of a state: of the run's table, otherwise of the table of a healing."""
    rows = [*_rows(summary), *_rows({} if kept is None else kept.document)]
    return next((row for row in rows if row.get("schedule") == state), None)


def _state(
    run: Path, config: Config, prior: Prior, wanted: str | None, healed: Path | None, rows: Collection[object]
) -> str:
    """Return the state that is wanted, or the furthest one that the run reached.

    "repaired" is also accepted where the run measured no repair but has what it takes to repeat one.

    Args:
        rows: names of the rows of the run's table. A state that it names must be there.
    """
    has = {
        "healed": healed is not None or (run / HEALED / STATE).is_file(),
        "repaired": prior.was_repaired,
        "searched": True,
    }
    if wanted is None:
        if lost := [name for name in STATES if name in rows and not has[name]]:
            raise Refusal(
                f"the table of {run} has the row {lost[0]}, but the run was not {lost[0]} according to its other "
                "files; put them back, or name another state with --state"
            )
        return next(name for name in STATES if has[name])
    if wanted not in STATES:
        raise Refusal(f"state must be one of {', '.join(STATES)}, got {wanted!r}")
    can_be_repaired = bool(config.repair_tokens) and any(not choice.is_dense for _, choice in prior.schedule)
    if not has[wanted] and not (wanted == "repaired" and can_be_repaired):
        raise Refusal(f"state must be one that the run has, and {run} was not {wanted}")
    return wanted
