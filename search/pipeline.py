"""The pipeline of a run: load, divide the data, calibrate, decompose, search, select, measure, write.

Knows the order of the stages and what a run folder receives; how a stage works stands in `search.stages`.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import agents
from agents import SavedPolicy
from compression.allocation import uniform_schedule
from compression.cache import cache_key
from compression.repair import repair_
from compression.schedule import Schedule
from compression.sites import Site, model_bytes, model_parameters, put_modules
from envs import LEVELS, REACH, Problem, Reward
from search.config import Config
from search.console import Console, Stage
from search.evaluators import Score
from search.items import forms, load_proxy
from search.journal import Journal
from search.latency import against_dense
from search.models import LoadedModel, resolve_device
from search.packages import cache_folder
from search.prior import build_prior
from search.quality import paired_kl
from search.runfolder import CONFIG, ENVIRONMENT, PRIOR, STUDY, SUMMARY, TRIALS, RunFolder, environment, refuse_used
from search.stages import SHRINKAGE, Trial, best_trials, run_agent
from search.subject import Subject, load, smallest_parameters
from search.table import csv_text

__all__ = ["RunSummary", "plan", "run"]

_FINALISTS = 6
_REPAIR_PASSES = 6  # forward passes that repairing on a token costs, about


@dataclass(frozen=True)
class RunSummary:
    """What a run ends with."""

    folder: Path
    document: Mapping[str, object]
    failures: int

    @property
    def rows(self) -> Sequence[Mapping[str, object]]:
        """The final table."""
        rows = self.document["rows"]
        assert isinstance(rows, list)
        return rows


def run(config: Config, console: Console) -> RunSummary:
    """Run everything; the run folder holds the results.

    Raises:
        ValueError: refused input.
        DataUnavailable: data or model cannot be had.
    """
    device = _preflight(config)
    with console.stage("load"):
        loaded, sites = load(config, device)
    _read_policy(config, loaded)
    if staying := _stays_dense(sites):
        name, reason = next(iter(staying.items()))
        console.note(f"{len(staying)} of {len(sites)} sites stay dense and count as dense, such as {name}: {reason}")
    with console.stage("data"):
        subject = Subject.of(config, loaded, sites, device)
    if config.resume:
        folder = RunFolder.resume(config.resume)
    else:
        folder = RunFolder.new(config.out, config.agent, config.model, config.seed)
    with folder:
        console.opened(folder.path)
        folder.write_text(CONFIG, config.to_json())
        folder.write_json(ENVIRONMENT, environment())
        return _run_in(folder, config, subject, console)


def plan(config: Config) -> Mapping[str, object]:
    """What `run` would do, without doing it: nothing is calibrated, evaluated or written.

    Raises:
        ValueError, DataUnavailable: as `run`.
    """
    device = _preflight(config)
    loaded, sites = load(config, device)
    _read_policy(config, loaded)
    subject = Subject.of(config, loaded, sites, device)
    searched, [selected], [heldout] = (subject.shards(part) for part in ("search", "selection", "heldout"))
    tokens = {
        name: sum(len(row.tokens) for row in rows)
        for name, rows in (("trial", searched[0]), ("selection", selected), ("held-out", heldout))
    }
    parameters = sum(site.parameters for site in sites)
    forward = (
        6 * config.calibration_tokens
        + (config.budget + 2 * config.search_shards) * tokens["trial"]
        + (_FINALISTS + 2) * tokens["selection"]
        + 8 * tokens["held-out"]
        + _REPAIR_PASSES * min(config.repair_tokens, config.calibration_tokens)
    )
    families = sorted({site.family for site in sites}, key=[site.family for site in sites].index)
    smallest = smallest_parameters(sites) / parameters
    return {
        "model": {
            "name": loaded.model_id,
            "parameters": model_parameters(loaded.model),
            "bytes": model_bytes(loaded.model),
            "sites": len(sites),
            "site_parameters": parameters,
            "stays_dense": _stays_dense(sites),
            "blocks": 1 + max(site.block for site in sites),
            "families": families,
        },
        "search": {
            "agent": config.agent,
            "budget": config.budget,
            "target_kept": config.target_kept,
            "reachable_kept": f"{smallest:.4f} to 1",
            "granularity": config.granularity,
            "ladder": f"{LEVELS - 1} log-price offsets from {-REACH} to {REACH} around the closed form, and dense",
            "seed": config.seed,
        },
        "data": {
            "proxy": config.proxy,
            "calibration_tokens": subject.splits.calibration.tokens,
            "tokens_per_trial": tokens["trial"],
            "selection_tokens": tokens["selection"],
            "held_out_tokens": tokens["held-out"],
            "report_items": len(subject.splits.report_items),
        },
        "cost": {
            "forward_tokens": forward,
            "estimated_minutes": round(forward * subject.seconds_per_token() / 60, 1),
            "statistics_cached": subject.calibration.cache.has(subject.calibration.key),
        },
        "device": f"{device}, {str(loaded.model.dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads",
        "output": str(Path(config.resume or config.out or "results").absolute()),
    }


def _preflight(config: Config) -> torch.device:
    """Refuse what can be refused before anything is loaded."""
    if config.proxy_form not in forms(config.proxy):
        raise ValueError(
            f"proxy_form must be {' or '.join(forms(config.proxy))} for {config.proxy}, got {config.proxy_form!r}"
        )
    if config.proxy.endswith(".jsonl"):
        load_proxy(config.proxy)
    _read_policy(config)
    if config.out is not None:
        refuse_used(Path(config.out))
    return resolve_device(config.device)


def _read_policy(config: Config, loaded: LoadedModel | None = None) -> SavedPolicy | None:
    """What the search starts from, refused if it is of another agent or, once that is known, of another model."""
    if config.policy is None:
        return None
    policy = SavedPolicy.read(Path(config.policy))
    policy.check(config.agent, policy.subject if loaded is None else loaded.digest)
    return policy


def _run_in(folder: RunFolder, config: Config, subject: Subject, console: Console) -> RunSummary:
    _check_space(subject)
    calibration = subject.calibration
    for name, part in (("calibrate", calibration.unweighted), ("weight tokens", calibration)):
        if calibration.cache.has(calibration.key):
            break
        with console.stage(name, config.calibration_tokens, "tokens") as stage:
            part.progress = _advancing(stage)
            part()
    baselines = _baselines(config, subject, console)
    with console.stage("decompose", len(subject.sites), "matrices") as stage:
        menu = subject.store.menu(progress=lambda done: stage.advance(1))
        problem = Problem.build(menu, config.target_kept, config.granularity)
        for schedule in baselines.values():
            for name, choice in schedule:
                if not choice.is_dense:
                    subject.store.cores(name, choice)
    subject.calibration.release()
    trials, chosen = _search(folder, config, subject, problem, console)
    scores = _measure(subject, {**baselines, "lagrangian": problem.closed_form(), "searched": chosen}, chosen, console)
    with console.stage("time"):
        costs = cache_folder() / "layer-costs.json"
        latency = against_dense(subject.loaded.model, subject.store, chosen, config.optimize, costs)
    if latency:
        console.note(f"searched: {latency}")
    rows = [_row(name, score) for name, score in scores.items()]
    comparison = _comparison(scores)
    if comparison:
        console.note(
            f"held-out KL, searched minus lagrangian: {comparison['value']:+.4f} ± {comparison['standard_error']:.4f}"
            f" nats/token ({comparison['relative']:+.1%}, {comparison['sequences']} sequences)"
        )
    failures = sum(trial.score.state == "failed" for trial in trials)
    document: dict[str, object] = {
        "model": subject.loaded.model_id,
        "agent": config.agent,
        "budget": config.budget,
        "target_kept": config.target_kept,
        "seed": config.seed,
        "proxy": config.proxy,
        "trials": len(trials),
        "failed_trials": failures,
        "folder": str(folder.path),
        "stays_dense": _stays_dense(subject.sites),
        "rows": rows,
        "searched_against_lagrangian_kl": comparison,
        "latency": dataclasses.asdict(latency) if latency else {},
        "environment": environment(),
    }
    folder.write_json(SUMMARY, document)
    folder.write_json(PRIOR, build_prior(config, subject.loaded, subject.sites, chosen, rows, subject.splits))
    return RunSummary(folder.path, document, failures)


def _advancing(stage: Stage) -> Callable[[int], None]:
    """Turns how much is done in all into how much has come to it."""
    seen = 0

    def progress(done: int) -> None:
        nonlocal seen
        stage.advance(done - seen)
        seen = done

    return progress


def _search(
    folder: RunFolder, config: Config, subject: Subject, problem: Problem, console: Console
) -> tuple[list[Trial], Schedule]:
    """Run the agent; returns its trials and the schedule selected from the best of them and the closed form."""
    policy = _read_policy(config, subject.loaded)
    terms = agents.Terms(config.seed, config.budget, config.search_shards, subject=subject.loaded.digest, policy=policy)
    agent = agents.make(config.agent, problem, terms)
    journal = Journal(
        folder / STUDY, _fingerprint(config, subject), [group.name for group in problem.groups], problem.levels
    )
    closed_form = problem.closed_form()
    try:
        with subject.evaluator("search", closed_form) as evaluator:
            reward = Reward(dense_expected_accuracy=evaluator.dense.expected_accuracy)
            done = min(len(journal.records), config.budget)
            with console.stage("search", config.budget, "trials", done) as stage:
                trials = run_agent(agent, config.budget, evaluator, reward, journal, stage, _describe)
        folder.write_text(TRIALS, csv_text(journal.rows()))
    finally:
        journal.close()
    finalists = [proposal.schedule for proposal in agent.recommend(_FINALISTS)]
    if isinstance(agent, agents.Learner):
        agent.saved_policy().write(folder.path)
    return trials, _select(subject, closed_form, finalists, console)


def _select(subject: Subject, closed_form: Schedule, finalists: Sequence[Schedule], console: Console) -> Schedule:
    """The finalist with the lowest KL on text and items that no trial saw, if it beats the closed form there.

    To beat it means a paired KL difference below minus one standard error; otherwise the closed form stays. A finalist
    that is clearly worse than the best so far is not measured to the end, see `search.racing`.
    """
    challengers = {schedule.digest: schedule for schedule in finalists if schedule.digest != closed_form.digest}
    if not challengers:
        return closed_form
    with (
        subject.evaluator("selection") as evaluator,
        console.stage("select", 1 + len(challengers), "schedules") as stage,
    ):
        best, best_value = closed_form, math.inf
        [reference] = evaluator.evaluate([closed_form])
        rival = reference if reference.state == "ok" else None
        stage.advance(1)
        for schedule in challengers.values():
            [score] = evaluator.evaluate([schedule], rival)
            if score.state == "ok" and reference.state == "ok":
                difference = paired_kl(score.quality, reference.quality)
                if difference.value < min(best_value, -difference.standard_error):
                    best, best_value, rival = schedule, difference.value, score
            stage.advance(1)
    return best


def _measure(
    subject: Subject, schedules: Mapping[str, Schedule], chosen: Schedule, console: Console
) -> dict[str, Score]:
    """Scores for the final table, on held-out text and report items: dense, every schedule, and the chosen repaired."""
    with subject.evaluator("heldout") as evaluator:
        with console.stage("measure", len(schedules), "schedules") as stage:
            scores = {"dense": evaluator.dense}
            known: dict[str, Score] = {}
            for name, schedule in schedules.items():
                if schedule.digest not in known:
                    [known[schedule.digest]] = evaluator.evaluate([schedule])
                scores[name] = known[schedule.digest]
                stage.advance(1, f"{name}: KL {scores[name].kl:.3f}")
        batches = subject.repair_batches()
        if not batches or all(choice.is_dense for _, choice in chosen):
            return scores
        evaluator.close()
        model, calibration = subject.loaded.model, subject.calibration
        with console.stage("repair", 1 + max(site.block for site in subject.sites), "blocks") as stage:
            taken = repair_(
                model,
                subject.sites,
                chosen,
                calibration(),
                batches,
                SHRINKAGE,
                progress=lambda done: stage.advance(1),
            )
            try:
                scores["repaired"] = evaluator.score_as_is(chosen)
            finally:
                put_modules(model, taken)
                calibration.release()
    return scores


def _row(name: str, score: Score) -> dict[str, object]:
    """A row of the final table; standard errors under the names the table knows."""
    figures = {key.replace("standard_error", "stderr"): value for key, value in score.to_dict().items()}
    return {"schedule": name, **figures}


def _comparison(scores: Mapping[str, Score]) -> dict[str, object]:
    """How far the searched schedule's held-out KL lies from the closed form's, paired over sequences."""
    searched, closed = scores["searched"].quality, scores["lagrangian"].quality
    if searched.state != "ok" or closed.state != "ok":
        return {}
    return dataclasses.asdict(paired_kl(searched, closed))


def _stays_dense(sites: Sequence[Site]) -> dict[str, str]:
    """Why, by name, of every site that cannot be tensorized."""
    return {site.name: site.dense_because for site in sites if site.dense_because}


def _baselines(config: Config, subject: Subject, console: Console) -> dict[str, Schedule]:
    """Uniform χ: plain sequential-SVD MPO, input-whitened low rank, two-sided low rank; all at the target.

    One that cannot reach the target at these shapes, as MPOs of prime dimensions cannot, is left out with a remark.
    """
    target = math.floor(config.target_kept * sum(site.parameters for site in subject.sites) + 1e-6)
    kinds = {
        "uniform-plain": ("mpo2", "plain"),
        "uniform-whitened": ("lowrank", "input"),
        "uniform": ("lowrank", "two-sided"),
    }
    baselines = {}
    for name, (topology, metric) in kinds.items():
        try:
            baselines[name] = uniform_schedule(subject.sites, topology, metric, target)
        except ValueError as error:
            console.note(f"baseline {name} ({topology}, {metric}) is left out: {error}")
    return baselines


def _fingerprint(config: Config, subject: Subject) -> dict[str, object]:
    """Everything that decides what a trial is and scores; a resumed run must agree."""
    splits = subject.splits
    return {
        "configuration": config.definition(),
        "model": subject.loaded.digest,
        "statistics": subject.calibration.key,
        "search_text": splits.search_text.digest,
        "search_items": cache_key(items=[item.digest for item in splits.search_items]),
        "reward": dataclasses.asdict(Reward()),
        "dtype": str(subject.loaded.model.dtype),
        **({"policy": policy.digest} if (policy := _read_policy(config, subject.loaded)) else {}),
    }


def _describe(trials: Sequence[Trial]) -> str:
    best = best_trials(trials, 1)
    return f"best KL {best[0].score.kl:.4f}, first {trials[0].score.kl:.4f}" if best else "no score yet"


def _check_space(subject: Subject) -> None:
    """Refuse to start building a cache that the disk cannot hold: moments of two passes, three sets of factors."""
    cache = subject.calibration.cache
    if cache.root is None or cache.has(subject.calibration.key):
        return
    sites = [site for site in subject.sites if not site.dense_because]
    moments = sum(site.out_features**2 + site.in_features**2 for site in sites)
    lowrank = sum(min(site.out_features, site.in_features) * (site.out_features + site.in_features) for site in sites)
    needed = 4 * (2 * moments + 2 * lowrank + sum(site.parameters for site in sites))
    cache.root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache.root).free
    if free < needed:
        text = f"the cache {cache.root} needs {needed / 1e9:.1f} GB of disk and {free / 1e9:.1f} GB are free"
        raise OSError(errno.ENOSPC, text)
