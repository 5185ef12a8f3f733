"""The pipeline of a run: load, split the data, calibrate, decompose, search, select, measure, write.

Knows the order of the stages and which files a run folder receives. Each stage is implemented in a module of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from agents import Learner
from compression.refusal import Refusal
from compression.schedule import Schedule
from compression.storage.strict_json import read_object
from envs import Problem
from search.config import FREE_AFTERWARDS, Config
from search.evaluation.latency import against_dense, layer_costs
from search.experiment.experiment import Experiment
from search.experiment.open_model import open_model, staying_dense
from search.experiment.preparation import advancing, calibrate, check_space, stays_dense, stays_on_disk
from search.healing.state import HEALED, STATE
from search.pipeline.baselines import baseline_schedules
from search.pipeline.measure import against_closed_form, measure, speed
from search.pipeline.rehearsal import rehearse
from search.priors.build import build_prior
from search.reporting.frames import csv_text
from search.reporting.run_report import REPORT, report
from search.runtime.console import Console
from search.runtime.provenance import environment
from search.runtime.run_digest import write_digest
from search.runtime.run_folder import (
    CONFIG,
    DIGEST,
    ENVIRONMENT,
    PRIOR,
    SCORES,
    STAGES,
    STUDY,
    SUMMARY,
    TABLE,
    TRIALS,
    RunFolder,
)
from search.runtime.stage_times import StageTimes
from search.runtime.tensorboard import curves
from search.trials.kept_scores import KeptScores, keeping
from search.trials.loop import Trial, run_agent, spent
from search.trials.preflight import preflight
from search.trials.selection import challengers, finalist_count, select
from search.trials.setup import make_agent, open_journal, refuse_other_search, reward_of
from search.trials.starting_point import StartingPoint
from search.workers.pools import shown_search_pool

__all__ = ["MADE_OF", "RunSummary", "run"]

MADE_OF = (CONFIG, PRIOR, SUMMARY, f"{HEALED}/{STATE}")
"""The files that the digest of a run covers. They hold the digests of its weight files."""

_TIMED = ("uniform", "lagrangian", "searched")


@dataclass(frozen=True)
class RunSummary:
    """The result of a run.

    Attributes:
        folder: the run folder.
        document: the content of summary.json.
        failures: trials that failed, at least 0.
        experiment: the model, dense again, with its data and statistics.
        fault: the fault of ours that kept the result from being repaired and healed; raise it once all is written.
    """

    folder: Path
    document: Mapping[str, object]
    failures: int
    experiment: Experiment
    fault: Exception | None = None

    @property
    def rows(self) -> Sequence[Mapping[str, object]]:
        """The final table, with the keys of `search.reporting.tables.SUMMARY_COLUMNS`."""
        rows = self.document["rows"]
        assert isinstance(rows, list)
        return rows


def run(config: Config, console: Console) -> RunSummary:
    """Run the whole search and write its results into the run folder.

    Raises:
        ValueError: refused input.
        DataUnavailable: data or model cannot be had.
    """
    config, device, start = preflight(config)
    with console.stage("load", 100, "%") as stage:
        loaded, sites = open_model(config, device, progress=stage.advance)
    start.check(loaded, sites)
    if on_disk := stays_on_disk(loaded):
        console.note(on_disk)
    if staying := stays_dense(sites):
        console.note(
            f"{len(staying)} of {len(sites)} sites stay dense and are counted as dense: {staying_dense(sites)}"
        )
    with console.stage("data"):
        experiment = Experiment.of(config, loaded, sites, device, console.note)
        rehearse(experiment, start)
    for note in experiment.splits.notes:
        console.note(note)
    if config.resume is not None:
        refuse_other_search(Path(config.resume) / STUDY, config, experiment, start)
    with RunFolder.open(config.resume, config.out, config.agent, config.model, config.seed) as folder:
        console.opened(folder.path)
        console.time_stages(StageTimes(folder / STAGES).add)
        folder.write_text(CONFIG, config.to_json())
        before = _written(folder.path / ENVIRONMENT)
        folder.write_json(ENVIRONMENT, environment(before) | {"digest": DIGEST})
        return _run_in(folder, experiment, start, before, console)


def _written(path: Path) -> Mapping[str, object]:
    """The environment that an interrupted run wrote; empty if it wrote none that can be read."""
    try:
        return read_object(path, "the environment")
    except (OSError, Refusal):
        return {}


def _run_in(
    folder: RunFolder, experiment: Experiment, start: StartingPoint, before: Mapping[str, object], console: Console
) -> RunSummary:
    config = experiment.config
    check_space(experiment, console.note)
    calibrate(experiment, console)
    baselines = baseline_schedules(experiment, console)
    with console.stage("decompose", len(experiment.sites), "matrices") as stage:
        menu = experiment.menu(advancing(stage))
    factored = [pair for schedule in baselines.values() for pair in schedule if pair[1].is_factored]
    if experiment.calibration.by_block:  # the cache of a large model does not keep all of them
        factored = []
    with console.stage("baselines", len(factored), "matrices") as stage:
        for name, choice in factored:
            experiment.store.cores(name, choice)
            stage.advance(1)
    experiment.calibration.release()
    plain = Problem.build(menu, experiment.budget.target_kept, config.granularity)
    closed_form = plain.closed_form()
    problem, notes = start.center(plain)
    for note in notes:
        console.note(f"prior: {note}")
    kept = KeptScores(folder / SCORES, console.note)
    trials, chosen = _search(folder, experiment, problem, start, closed_form, kept, console)
    schedules = {**baselines, "lagrangian": closed_form}
    if config.prior is not None:
        schedules["prior"] = problem.closed_form()
    schedules["searched"] = chosen
    scores, fault = measure(experiment, schedules, chosen, folder.path, kept, console)
    with console.stage("time"):
        timed = {name: schedule for name, schedule in schedules.items() if name in _TIMED}
        continues = not experiment.loaded.kind.is_encoder
        how = config.optimize, layer_costs(), continues, experiment.calibration.by_block
        latencies = against_dense(experiment.loaded.model, experiment.store, timed, *how)
    latency = latencies.get("searched")
    if latency:
        console.note(f"searched: {latency}")
    rows = [score.to_row(name) | speed(name, latencies) for name, score in scores.items()]
    comparisons = {name: against_closed_form(scores, name) for name in ("prior", "searched") if name in scores}
    for name, found in comparisons.items():
        if found:
            console.note(
                f"held-out KL, {name} minus lagrangian: {found['value']:+.4f} ± {found['standard_error']:.4f}"
                f" nats/token ({found['relative']:+.1%}, {found['sequences']} sequences)"
            )
    failures = sum(trial.score.state == "failed" for trial in trials)
    document: dict[str, object] = {
        "model": experiment.loaded.model_id,
        "agent": config.agent,
        "budget": config.budget,
        "target_kept": experiment.budget.target_kept,
        **({"size": config.size} if config.size is not None else {}),
        "seed": config.seed,
        "proxy": config.proxy,
        "heal_minutes": config.heal_minutes,
        "trials": len(trials),
        "failed_trials": failures,
        "folder": str(folder.path),
        "stays_dense": stays_dense(experiment.sites),
        "rows": rows,
        **{f"{name}_against_lagrangian_kl": found for name, found in comparisons.items()},
        "latency": dataclasses.asdict(latency) if latency else {},
        "environment": environment(before),
    }
    folder.write_json(SUMMARY, document)
    folder.write_text(TABLE, csv_text(rows))
    prior = build_prior(config, experiment.loaded, menu, chosen, rows, experiment.splits, before=before)
    folder.write_text(PRIOR, prior.to_json())
    write_digest(folder, MADE_OF, experiment.loaded.identity, FREE_AFTERWARDS)
    folder.write_text(REPORT, report([folder.path]))
    return RunSummary(folder.path, document, failures, experiment, fault)


def _search(
    folder: RunFolder,
    experiment: Experiment,
    problem: Problem,
    start: StartingPoint,
    closed_form: Schedule,
    kept: KeptScores,
    console: Console,
) -> tuple[list[Trial], Schedule]:
    """Run the agent; returns its trials and the schedule selected among its best, the prior and the closed form.

    Args:
        problem: centered on the prior if there is one; its own closed form is then the schedule of the prior.
        kept: scores of an interrupted selection, which are not measured again; receives those that are measured.
    """
    config = experiment.config
    if not config.budget:
        console.note("budget 0: no search, only the baselines are measured")
    agent = make_agent(config, problem, experiment, start)
    journal = open_journal(folder / STUDY, config, experiment, problem, start)
    try:
        with ExitStack() as opened:
            pool = opened.enter_context(shown_search_pool(experiment, closed_form, console))
            drawn = opened.enter_context(curves(folder.path))
            done = min(spent(journal), config.budget)
            with console.stage("search", config.budget, "trials", done) as stage:
                reward = reward_of(config, pool.dense)
                trials = run_agent(agent, config.budget, pool, reward, journal, stage, drawn)
        folder.write_text(TRIALS, csv_text(journal.rows()))
    finally:
        journal.close()
    recommended = [proposal.schedule for proposal in agent.recommend(finalist_count(config.budget))]
    finalists = challengers(closed_form, [problem.closed_form(), *recommended])
    if isinstance(agent, Learner):
        agent.saved_policy().write(folder.path)
    if not finalists:
        return trials, closed_form
    with (
        console.stage("select", 2 + len(finalists), "schedules") as stage,
        experiment.evaluator("selection", progress=lambda: stage.advance(1)) as evaluator,
    ):
        measuring = keeping(kept, evaluator, experiment.measured_on("selection"))
        [reference] = measuring.evaluate([closed_form])
        stage.advance(1)
        return trials, select(measuring, closed_form, reference, finalists, stage)
