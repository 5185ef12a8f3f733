"""Trials: a search by one agent on a subject, and the choice among what it recommends.

Composes agents, environment, evaluators and the journal; knows no run folder and no command.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import agents
from agents import Agent, Proposal, SavedPolicy, SlopeAgent
from compression.schedule import Schedule
from envs import Problem, Reward
from search.config import Config
from search.evaluation.evaluator import Evaluator, Score
from search.evaluation.pool import Job, Pool, Result
from search.evaluation.quality import paired_kl
from search.experiment.experiment import Subject
from search.model.loading import LoadedModel
from search.runtime.console import Stage
from search.runtime.tensorboard import Curves
from search.trials.journal import Journal, Record, refuse_another
from search.trials.starting_point import prior_digest

__all__ = [
    "FINALISTS",
    "Trial",
    "best_trials",
    "challengers",
    "describe",
    "fingerprint",
    "fingerprint_defaults",
    "make_agent",
    "open_journal",
    "read_policy",
    "refuse_other_search",
    "reward_of",
    "run_agent",
    "select",
    "spent",
]

FINALISTS = 6
"""Recommendations of an agent that meet the closed form on the selection set."""


@dataclass(frozen=True)
class Trial:
    """One evaluated proposal."""

    number: int
    proposal: Proposal
    score: Score
    reward: float


def run_agent(
    agent: Agent,
    budget: int,
    pool: Pool,
    reward: Reward,
    journal: Journal,
    stage: Stage | None = None,
    drawn: Curves | None = None,
) -> list[Trial]:
    """Ask, evaluate, journal, tell, until the budget is spent or the agent has finished; trials in the order proposed.

    The agent is asked, one proposal at a time, whenever the pool has room, and told of every result when it comes: at
    most `pool.capacity` - 1 others are on their way then. Every trial is on disk before the agent hears of it, with how
    often it had been asked by then. Trials the journal holds already are told from it in that very order, so a resumed
    search replays to where it stopped, whatever number of evaluators it had; what was under way is evaluated again.

    Raises:
        ValueError: the journal is not of this agent.
    """
    trials: list[Trial] = []
    waiting: dict[int, Proposal] = {}
    calls = proposed = charged = 0

    def ask() -> int | None:
        nonlocal calls, proposed, charged
        calls += 1
        for proposal in agent.ask(1):
            waiting[proposed] = proposal
            charged += proposal.cost
            proposed += 1
            return proposed - 1
        return None

    def tell(number: int, result: Result) -> None:
        proposal = waiting.pop(number)
        trial = Trial(number, proposal, result.score, reward(result.score))
        journal.record(_record(trial, result.slopes, calls))
        trials.append(trial)
        if result.slopes is not None:
            cast(SlopeAgent, agent).tell_slopes(proposal, result.slopes)
        agent.tell([proposal], [trial.reward])

    def submit(number: int) -> None:
        proposal = waiting[number]
        pool.submit(number, Job(proposal.schedule, proposal.look, proposal.probe))

    for record in journal.told:
        if sum(trial.proposal.cost for trial in trials) >= budget:
            return _in_order(trials)
        while calls < record.asked:
            ask()
        if record.number not in waiting:
            raise ValueError(f"{journal.path} has a trial {record.number} that the resumed search does not propose")
        tell(record.number, Result(Score.from_dict(record.score), record.slopes))
    for number in waiting:
        submit(number)
    while True:
        while charged < budget and len(waiting) < pool.capacity and (fresh := ask()) is not None:
            submit(fresh)
        if not waiting:
            return _in_order(trials)
        number, result = pool.finished()
        cost = waiting[number].cost
        tell(number, result)
        if stage is not None:
            stage.advance(cost, describe(trials))
        if drawn is not None:
            score = trials[-1].score
            points = {"reward": trials[-1].reward, "KL": score.kl, "kept": score.kept_fraction}
            drawn.draw(number, {f"search/{name}": value for name, value in points.items()})


def _in_order(trials: Sequence[Trial]) -> list[Trial]:
    return sorted(trials, key=lambda trial: trial.number)


def best_trials(trials: Sequence[Trial], count: int) -> list[Trial]:
    """The `count` best by reward with a score, best first; ties go to the earlier trial."""
    scored = [trial for trial in trials if trial.score.state == "ok"]
    return sorted(scored, key=lambda trial: (-trial.reward, trial.number))[:count]


def _record(trial: Trial, slopes: Mapping[str, float] | None, asked: int) -> Record:
    ok = trial.score.state == "ok"
    return Record(
        number=trial.number,
        digest=trial.proposal.schedule.digest,
        schedule=trial.proposal.schedule.to_json(),
        look=trial.proposal.look,
        actions=trial.proposal.actions,
        score=trial.score.to_dict(),
        reward=trial.reward if ok else None,
        state=trial.score.state,
        reason=trial.score.reason,
        seconds=trial.score.seconds,
        slopes=slopes,
        asked=asked,
    )


def select(
    evaluator: Evaluator,
    closed_form: Schedule,
    reference: Score,
    finalists: Sequence[Schedule],
    stage: Stage | None = None,
) -> Schedule:
    """The finalist with the lowest KL on text and items that no trial saw, if it beats the closed form there.

    To beat it means a paired KL difference below minus one standard error; otherwise the closed form stays. A finalist
    that is clearly worse than the best so far is not measured to the end, see `search.evaluation.early_stopping`.

    Args:
        evaluator: on the selection set.
        reference: score of the closed form there.
    """
    best, best_value = closed_form, math.inf
    rival = reference if reference.state == "ok" else None
    for schedule in challengers(closed_form, finalists):
        [score] = evaluator.evaluate([schedule], rival)
        if score.state == "ok" and reference.state == "ok":
            difference = paired_kl(score.quality, reference.quality)
            if difference.value < min(best_value, -difference.standard_error):
                best, best_value, rival = schedule, difference.value, score
        if stage is not None:
            stage.advance(1)
    return best


def challengers(closed_form: Schedule, finalists: Sequence[Schedule]) -> list[Schedule]:
    """The finalists that differ from the closed form, each once."""
    different = {schedule.digest: schedule for schedule in finalists if schedule.digest != closed_form.digest}
    return list(different.values())


def reward_of(config: Config, dense: Score) -> Reward:
    """The reward of a configuration, given what the dense model scores on the search set."""
    return replace(_weighted(config), dense_expected_accuracy=dense.expected_accuracy)


def fingerprint(config: Config, subject: Subject) -> dict[str, object]:
    """Everything that decides what a trial is and scores; a resumed run must agree."""
    return {
        "configuration": config.definition(),
        **subject.identity,
        "reward": dataclasses.asdict(_weighted(config)),
        **({"policy": policy.digest} if (policy := read_policy(config, subject.loaded)) else {}),
        **({"prior": digest} if (digest := prior_digest(config)) else {}),
    }


def open_journal(path: Path, config: Config, subject: Subject, problem: Problem) -> Journal:
    """The journal of a search by `config.agent`; raises ValueError as `Journal` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return Journal(path, fingerprint(config, subject), problem.names, problem.levels, fingerprint_defaults())


def refuse_other_search(path: Path, config: Config, subject: Subject) -> None:
    """Refuse to continue the journal of another search before anything is computed; raises ValueError as `Journal`."""
    refuse_another(path, fingerprint(config, subject), fingerprint_defaults())


def fingerprint_defaults() -> dict[str, object]:
    """What a fingerprint of an earlier version would say of fields that came later: a run without them had these."""
    names = Config.of({}).definition()
    return {
        "configuration": {name: Config.model_fields[name].default for name in names},
        "reward": dataclasses.asdict(Reward()),
    }


def spent(journal: Journal) -> int:
    """Evaluations that the trials of a journal were charged for."""
    return sum(1 if record.slopes is None else agents.SLOPES_COST for record in journal.records)


def make_agent(config: Config, problem: Problem, subject: Subject) -> Agent:
    """`config.agent` on `problem`; raises ValueError as `agents.make` does."""
    terms = agents.Terms(
        config.seed,
        config.budget,
        config.search_shards,
        config.compression_weight,
        subject=subject.loaded.digest,
        policy=read_policy(config, subject.loaded),
    )
    return agents.make(config.agent, problem, terms)


def read_policy(config: Config, loaded: LoadedModel | None = None) -> SavedPolicy | None:
    """What the search starts from, refused if it is of another agent or, once that is known, of another model."""
    if config.policy is None:
        return None
    policy = SavedPolicy.read(Path(config.policy))
    policy.check(config.agent, policy.subject if loaded is None else loaded.digest)
    return policy


def describe(trials: Sequence[Trial]) -> str:
    """The best so far, in a few words."""
    best = best_trials(trials, 1)
    return f"best KL {best[0].score.kl:.4f}, first {trials[0].score.kl:.4f}" if best else "no score yet"


def _weighted(config: Config) -> Reward:
    weights = ("kl_weight", "correct_weight", "compression_weight", "bytes_weight", "latency_weight")
    return Reward(**{name: getattr(config, name) for name in weights})
