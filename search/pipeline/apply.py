"""Applies a prior to a model, unchanged or transferred, and measures the cost.

`fit_prior` finds the schedule, `compress_` puts the compressed modules into the model, and `apply` writes a folder. It
does not export weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compression.allocation.menu import Menu
from compression.decomposition.apply import ScheduleApplier
from compression.schedule import Schedule
from envs import Problem
from search.config import FREE_AFTERWARDS, Config
from search.experiment.experiment import Experiment
from search.experiment.open_model import open_model
from search.experiment.preparation import advancing, calibrate
from search.pipeline.rehearsal import rehearse_prior
from search.priors.build import build_prior, config_digest
from search.priors.format import Origin, Prior
from search.priors.transfer import Rule, check_families, exact_schedule, fits, transfer
from search.profiling.sensitivity import traces
from search.profiling.sweep import read_profile
from search.runtime.console import Console
from search.runtime.provenance import environment
from search.runtime.run_digest import write_digest
from search.runtime.run_folder import CONFIG, DIGEST, ENVIRONMENT, PRIOR, SUMMARY, RunFolder
from search.trials.preflight import preflight

__all__ = ["SCHEDULE", "Applied", "apply", "compress_", "fit_prior"]

SCHEDULE = "schedule.json"
_MADE_OF = (CONFIG, PRIOR, SUMMARY, SCHEDULE)


@dataclass(frozen=True, eq=False)
class Applied:
    """A prior's schedule for a model.

    Attributes:
        menu: of the model; None where the prior's own schedule is taken and nothing had to be calibrated.
        notes: how the schedule came about, in sentences.
    """

    schedule: Schedule
    menu: Menu | None
    notes: tuple[str, ...]


def fit_prior(
    prior: Prior, experiment: Experiment, target_kept: float | None, rule: Rule | None, console: Console
) -> Applied:
    """The schedule of a prior for the model of `experiment`.

    On the model it was made for, and on any with sites of the same names and shapes, it is the prior's own, unless
    another kept fraction is asked for. Otherwise it is transferred and projected onto the kept fraction.

    Args:
        target_kept: kept fraction to reach; None uses that of the prior.
        rule: see `search.priors.transfer.transfer`.

    Raises:
        ValueError: the prior names this model but other sites, no site fits, or the target is out of reach.
    """
    loaded = experiment.loaded
    same = prior.model.digest == loaded.digest
    architecture = prior.model.config_digest is not None and prior.model.config_digest == config_digest(loaded)
    if same or architecture or fits(prior, experiment.sites):
        schedule = exact_schedule(prior, experiment.sites)
        if same:
            notes = [f"the prior was made for this model ({prior.model.id})"]
        else:
            notes = [f"the prior was made for {prior.model.id}, whose matrices have the same names and shapes"]
        if target_kept in (None, prior.target_kept):
            return Applied(schedule, None, (*notes, "its schedule is used unchanged"))
    else:
        check_families(prior, experiment.sites, rule)
        notes = []
    menu = made_menu(experiment, console)
    found = transfer(prior, menu, rule)
    target = prior.target_kept if target_kept is None else target_kept
    problem = Problem.build(menu, target)
    projected = problem.centred(found.log_weights).closed_form()
    kept = problem.kept(projected)
    notes += [*found.notes, f"scaled from kept fraction {prior.kept_fraction:.4f} to the target {target}: {kept:.4f}"]
    return Applied(projected, menu, tuple(notes))


def compress_(experiment: Experiment, schedule: Schedule) -> ScheduleApplier:
    """Put the modules of a schedule into the model in their stored form; `restore_` of the result undoes this."""
    applier = ScheduleApplier(experiment.loaded.model, experiment.store, packed=True)
    applier.apply_(schedule)
    return applier


def made_menu(experiment: Experiment, console: Console) -> Menu:
    """The menus of all sites; calibration and decomposition run unless the cache has their results."""
    calibrate(experiment, console)
    with console.stage("decompose", len(experiment.sites), "matrices") as stage:
        return experiment.menu(advancing(stage))


def apply(
    config: Config,
    prior: Prior,
    console: Console,
    target_kept: float | None = None,
    rule: Rule | None = None,
    measure: bool = True,
    profile: Path | None = None,
) -> tuple[Path, Sequence[Mapping[str, object]], tuple[str, ...]]:
    """Fit a prior to a model, measure it on held-out data, and write a folder.

    Args:
        target_kept: as for `fit_prior`; a configuration with a size or a fraction of the bytes replaces it.
        measure: measure the schedule; without it, applying a prior to its own model computes nothing.
        profile: folder of a sweep of this model; its measured traces go into the new prior.

    Returns:
        The folder, the rows of the table, and remarks on how the prior was fitted.

    Raises:
        ValueError: as `fit_prior`, `search.pipeline.run.run` and `search.profiling.sweep.read_profile`.
        DataUnavailable: data or model cannot be had.
    """
    config, device, _ = preflight(config)
    with console.stage("load", 100, "%") as stage:
        loaded, sites = open_model(config, device, progress=stage.advance)
    measured = traces(read_profile(profile, loaded)) if profile is not None else {}
    with console.stage("data"):
        experiment = Experiment.of(config, loaded, sites, device, console.note)
    for note in experiment.splits.notes:
        console.note(note)
    rehearse_prior(experiment)
    if config.size is not None or config.target_bytes_kept is not None:
        target_kept = experiment.budget.target_kept
    applied = fit_prior(prior, experiment, target_kept, rule, console)
    for note in applied.notes:
        console.note(note)
    with RunFolder.new(config.out, "apply", config.model, config.seed) as folder:
        console.opened(folder.path)
        folder.write_text(CONFIG, config.to_json())
        folder.write_json(ENVIRONMENT, environment() | {"digest": DIGEST})
        folder.write_text(SCHEDULE, applied.schedule.to_json() + "\n")
        if applied.menu is None and not measure and not measured:
            folder.write_text(PRIOR, prior.to_json())
            write_digest(folder, _MADE_OF, loaded.identity, FREE_AFTERWARDS)
            return folder.path, [], applied.notes
        menu = applied.menu or made_menu(experiment, console)
        experiment.calibration.release()
        rows = _measured(experiment, menu, applied.schedule, console) if measure else []
        made = build_prior(config, loaded, menu, applied.schedule, rows, experiment.splits, measured)
        origin = Origin(model=prior.model, schedule_digest=prior.schedule.digest, notes=applied.notes)
        folder.write_text(PRIOR, made.model_copy(update={"origin": origin}).to_json())
        folder.write_json(SUMMARY, {"model": loaded.model_id, "notes": applied.notes, "rows": rows})
        write_digest(folder, _MADE_OF, loaded.identity, FREE_AFTERWARDS)
    return folder.path, rows, applied.notes


def _measured(experiment: Experiment, menu: Menu, schedule: Schedule, console: Console) -> list[dict[str, object]]:
    """Table rows on held-out data: dense, uniform and closed form at the prior's kept fraction, and the prior."""
    stored = sum(experiment.budget.price(site, schedule[site.name]) for site in experiment.sites)
    problem = Problem.build(menu, stored / menu.dense_parameters)
    schedules = {"uniform": problem.uniform(), "lagrangian": problem.closed_form(), "prior": schedule}
    rows = []
    with experiment.evaluator("heldout") as evaluator, console.stage("measure", len(schedules), "schedules") as stage:
        rows.append(evaluator.dense.to_row("dense"))
        for name, one in schedules.items():
            [score] = evaluator.evaluate([one])
            rows.append(score.to_row(name))
            stage.advance(1, f"{name}: KL {score.kl:.3f}")
    return rows
