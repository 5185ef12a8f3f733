"""Compares several agents and seeds with one budget on the same data, and measures their recommendations.

Every search uses the same calibration, search and selection data; only the agent's seed differs. Equal budgets mean
equal evaluated tokens, up to the sizes of the shards that a schedule's digest selects. The recommendation after a part
of the budget comes from a fresh agent that the recorded trials are replayed into, so that asking for it does not
disturb the search. No agent sees the held-out data, and no schedule is measured there twice.

contest.json in the folder holds everything that the table and the plot of `search.comparison.standings` need. A
comparison continues from that file alone, also on another machine.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import agents
from compression.refusal import Refusal
from compression.schedule import Schedule
from compression.storage.strict_json import bounded_text
from envs import Problem
from search.comparison.standings import Entry, Heldout, Mark, check, plot, report
from search.config import Config
from search.evaluation.pool import Pool
from search.experiment.experiment import Experiment
from search.experiment.open_model import open_model
from search.experiment.preparation import advancing, calibrate
from search.reporting.opened_run import CONTEST
from search.runtime.console import Console
from search.runtime.provenance import environment
from search.runtime.run_folder import CONFIG, ENVIRONMENT, STUDY, RunFolder
from search.trials.fingerprints import differences, with_defaults, with_later
from search.trials.loop import run_agent, spent
from search.trials.preflight import preflight
from search.trials.selection import challengers, finalist_count, select
from search.trials.setup import fingerprint, fingerprint_defaults, make_agent, open_journal, reward_of
from search.trials.starting_point import StartingPoint
from search.workers.pools import shown_search_pool

__all__ = ["CURVE", "TABLE", "compare"]

TABLE, CURVE = "table.md", "curve.svg"
_PARTS = (0.25, 0.5, 1.0)  # parts of the budget after which an agent is asked for its recommendation
_FORMAT = 1
_LARGEST_FILE = 1 << 26  # bytes of contest.json, most of it text of schedules


def compare(config: Config, names: Sequence[str], seeds: Sequence[int], console: Console) -> tuple[Path, str]:
    """Run the missing searches of a comparison; returns its folder and the report in Markdown.

    Args:
        config: the configuration of every search; its agent is not used, and its seed is the seed of the data.
        names: names of the agents.
        seeds: seeds of the agents.

    Raises:
        ValueError: an unknown agent, a seed given twice, the folder of another comparison, or as
            `search.pipeline.run.run`.
        DataUnavailable: data or model cannot be had.
    """
    searches = _searches(config, names, seeds)
    config, device, start = preflight(config)
    for name in names:
        agents.find(name)
    with console.stage("load", 100, "%") as stage:
        loaded, sites = open_model(config, device, progress=stage.advance)
    with console.stage("data"):
        experiment = Experiment.of(config, loaded, sites, device, console.note)
    for note in experiment.splits.notes:
        console.note(note)
    with RunFolder.open(config.resume, config.out, "compare", config.model, config.seed) as folder:
        console.opened(folder.path)
        contest = _Contest.read(
            folder / CONTEST, _shared(fingerprint(config, experiment, start)) | {"budget": config.budget}
        )
        folder.write_text(CONFIG, config.to_json())
        folder.write_json(ENVIRONMENT, environment())
        entered = [search for search in searches if _key(search.agent, search.seed) not in contest.entries]
        if entered or not contest.complete:
            calibrate(experiment, console)
            with console.stage("decompose", len(sites), "matrices") as stage:
                menu = experiment.menu(advancing(stage))
            experiment.calibration.release()
            problem = Problem.build(menu, experiment.budget.target_kept, config.granularity)
            _play(folder, experiment, problem, contest, entered, console)
        standings = list(contest.entries.values()), contest.heldout, contest.closed_form
        text = report(*standings, title=f"{loaded.model_id} at {_target(config)}, {config.budget} evaluations")
        folder.write_text(TABLE, text)
        folder.write_text(CURVE, plot(*standings))
    return folder.path, text


def _target(config: Config) -> str:
    if config.size is not None:
        return config.size
    return (
        f"kept {config.target_kept}" if config.target_bytes_kept is None else f"{config.target_bytes_kept} of the bytes"
    )


@dataclass
class _Contest:
    """Content of contest.json.

    Attributes:
        schedules: schedules that still have to be selected among or measured, by digest.
    """

    fingerprint: Mapping[str, object]
    entries: dict[str, Entry] = field(default_factory=dict)
    heldout: dict[str, Heldout] = field(default_factory=dict)
    schedules: dict[str, Schedule] = field(default_factory=dict)
    closed_form: str = ""

    @property
    def complete(self) -> bool:
        return not self.schedules and all(entry.selected for entry in self.entries.values())

    def note(self, schedule: Schedule) -> str:
        """Add a schedule to select among and, unless it is done, to measure; returns its digest."""
        self.schedules[schedule.digest] = schedule
        return schedule.digest

    def write(self, folder: RunFolder) -> None:
        document = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "closed_form": self.closed_form,
            "entries": [asdict(entry) for _, entry in sorted(self.entries.items())],
            "heldout": {digest: asdict(measured) for digest, measured in sorted(self.heldout.items())},
            "schedules": [schedule.to_json() for _, schedule in sorted(self.schedules.items())],
        }
        folder.write_text(CONTEST, json.dumps(document, allow_nan=False, separators=(",", ":")) + "\n")

    @classmethod
    def read(cls, path: Path, expected: Mapping[str, object]) -> _Contest:
        if not path.exists():
            return cls(expected)
        text = bounded_text(path, "the comparison", _LARGEST_FILE)
        try:
            document = json.loads(text)
            if document["format"] != _FORMAT:
                raise Refusal(f"its format is {document['format']}, and {_FORMAT} is wanted")
            entries = [Entry.of(entry) for entry in document["entries"]]
            schedules = [Schedule.from_json(schedule) for schedule in document["schedules"]]
            found = cls(
                fingerprint=document["fingerprint"],
                entries={_key(entry.agent, entry.seed): entry for entry in entries},
                heldout={digest: Heldout.of(measured) for digest, measured in document["heldout"].items()},
                schedules={schedule.digest: schedule for schedule in schedules},
                closed_form=document["closed_form"],
            )
            if not isinstance(found.fingerprint, dict) or not isinstance(found.closed_form, str):
                raise Refusal("its fingerprint must be an object and its closed_form a digest")
            check(list(found.entries.values()), found.heldout, found.closed_form, found.schedules.keys())
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise Refusal(f"cannot use {path}: {error}") from None
        found.fingerprint = with_later(with_defaults(found.fingerprint, _shared(fingerprint_defaults())), expected)
        if found.fingerprint != expected:
            raise Refusal(f"{path} is another contest: " + "; ".join(differences(found.fingerprint, expected)))
        return found


def _play(
    folder: RunFolder,
    experiment: Experiment,
    problem: Problem,
    contest: _Contest,
    entered: Sequence[Config],
    console: Console,
) -> None:
    """Search with every agent entered, choose among what they recommend, measure; kept after every step."""
    closed_form = problem.closed_form()
    contest.closed_form = contest.note(closed_form)
    if entered:
        with shown_search_pool(experiment, closed_form, console) as pool:
            for config in entered:
                entry = _search(folder, experiment, problem, config, pool, contest, console)
                contest.entries[_key(config.agent, config.seed)] = entry
                contest.write(folder)
    if undecided := [entry for entry in contest.entries.values() if not entry.selected]:
        with (
            experiment.evaluator("selection") as evaluator,
            console.stage("select", len(undecided), "searches") as stage,
        ):
            [reference] = evaluator.evaluate([closed_form])
            for entry in undecided:
                finalists = [contest.schedules[digest] for digest in entry.finalists]
                winner = select(evaluator, closed_form, reference, challengers(closed_form, finalists))
                contest.entries[_key(entry.agent, entry.seed)] = dataclasses.replace(entry, selected=winner.digest)
                contest.write(folder)
                stage.advance(1, f"{entry.agent}, seed {entry.seed}")
    entries = contest.entries.values()
    wanted = {contest.closed_form, *(entry.selected for entry in entries)}
    wanted |= {mark.digest for entry in entries for mark in entry.marks}
    wanted -= contest.heldout.keys()
    contest.schedules = {digest: one for digest, one in contest.schedules.items() if digest in wanted}
    contest.write(folder)  # also if all that is wanted is measured already
    with (
        experiment.evaluator("heldout") as evaluator,
        console.stage("measure", len(contest.schedules), "schedules") as stage,
    ):
        for digest, schedule in list(contest.schedules.items()):
            [score] = evaluator.evaluate([schedule])
            contest.heldout[digest] = Heldout.from_quality(score.quality)
            del contest.schedules[digest]
            contest.write(folder)
            stage.advance(1)


def _search(
    folder: RunFolder,
    experiment: Experiment,
    problem: Problem,
    config: Config,
    pool: Pool,
    contest: _Contest,
    console: Console,
) -> Entry:
    """Run one search; trials that its journal holds are replayed."""
    rows = [sum(len(row.tokens) for row in shard) for shard in experiment.shards("search")]
    reward = reward_of(config, pool.dense)
    journal = open_journal(
        folder / _key(config.agent, config.seed) / STUDY, config, experiment, problem, StartingPoint()
    )
    try:
        with console.stage(f"{config.agent}, seed {config.seed}", config.budget, "trials", spent(journal)) as stage:
            trials = run_agent(
                make_agent(config, problem, experiment, StartingPoint()), config.budget, pool, reward, journal, stage
            )
        marks, finalists = [], []
        for part in _PARTS:
            agent = make_agent(config, problem, experiment, StartingPoint())
            start = time.perf_counter()
            told = run_agent(agent, round(part * config.budget), pool, reward, journal)
            recommended = [proposal.schedule for proposal in agent.recommend(finalist_count(config.budget))]
            seconds = time.perf_counter() - start
            evaluations = sum(trial.proposal.cost for trial in told)
            tokens = sum(trial.proposal.cost * rows[trial.score.shard] for trial in told)
            best = recommended[0] if recommended else problem.closed_form()
            marks.append(Mark(evaluations, tokens, contest.note(best)))
            finalists = [contest.note(schedule) for schedule in recommended]
    finally:
        journal.close()
    return Entry(
        agent=config.agent,
        seed=config.seed,
        marks=tuple(marks),
        finalists=tuple(finalists),
        selected="",
        agent_seconds=seconds,
        evaluation_seconds=sum(trial.score.seconds for trial in trials),
    )


def _key(name: str, seed: int) -> str:
    return f"{name}-{seed}"


def _shared(of: Mapping[str, object]) -> dict[str, object]:
    """The fingerprint that all searches of a comparison share, as plain JSON values."""
    plain: dict[str, Any] = json.loads(json.dumps(of))
    del plain["configuration"]["agent"]
    return plain


def _searches(config: Config, names: Sequence[str], seeds: Sequence[int]) -> list[Config]:
    """The configuration of every search, seed by seed, so that a contest cut short compares all agents."""
    for what, values in (("agents", list(names)), ("seeds", list(seeds))):
        if not values or len(set(values)) < len(values):
            raise Refusal(f"{what} must be one or more different values, got {','.join(map(str, values)) or 'none'}")
    if config.budget < len(_PARTS) + 1:
        raise Refusal(f"budget must be at least {len(_PARTS) + 1} in a comparison, got {config.budget}")
    shared = config.model_dump(exclude={"quick"})
    return [Config.of({**shared, "agent": name, "seed": seed}) for seed in seeds for name in names]
