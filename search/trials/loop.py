"""The search loop: asks an agent for proposals, has them evaluated, records them and tells the agent the rewards.

Composes agents, evaluators and the journal; knows no run folder and no command.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import agents
from agents import Agent, Proposal, SlopeAgent
from compression.refusal import Refusal
from envs import Reward
from search.evaluation.pool import Job, Pool, Result
from search.evaluation.score import Score
from search.runtime.console import Stage
from search.runtime.tensorboard import Curves
from search.trials.journal import Journal, Record

__all__ = ["Trial", "best_trials", "describe", "run_agent", "spent"]


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
    """Ask, evaluate, record and tell until the budget is spent or the agent has finished.

    The agent is asked for one proposal at a time, whenever the pool has room, and is told every result as it arrives;
    at most `pool.capacity` - 1 other proposals are being evaluated then. Every trial is on disk before the agent is
    told, together with the number of calls of `ask` so far. Trials that the journal already holds are told in the same
    order between the same calls, so a resumed search replays exactly to where it stopped, for any number of
    evaluators; proposals without a recorded result are evaluated again.

    Returns:
        The trials in the order of their proposals.

    Raises:
        ValueError: the journal belongs to another agent.
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
        pool.submit(number, Job(proposal.schedule, proposal.repeat, proposal.probe))

    for record in journal.told:
        if sum(trial.proposal.cost for trial in trials) >= budget:
            return _in_order(trials)
        while calls < record.asked:
            ask()
        expected = waiting.get(record.number)
        if expected is None or (expected.probe is None and record.slopes is not None):
            raise Refusal(f"{journal.path} has a trial {record.number} that the resumed search does not propose")
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
    """The `count` scored trials with the highest reward, best first; ties go to the earlier trial."""
    scored = [trial for trial in trials if trial.score.state == "ok"]
    return sorted(scored, key=lambda trial: (-trial.reward, trial.number))[:count]


def _record(trial: Trial, slopes: Mapping[str, float] | None, asked: int) -> Record:
    ok = trial.score.state == "ok"
    return Record(
        number=trial.number,
        digest=trial.proposal.schedule.digest,
        schedule=trial.proposal.schedule.to_json(),
        repeat=trial.proposal.repeat,
        actions=trial.proposal.actions,
        score=trial.score.to_dict(),
        reward=trial.reward if ok else None,
        state=trial.score.state,
        reason=trial.score.reason,
        seconds=trial.score.seconds,
        slopes=slopes,
        asked=asked,
    )


def spent(journal: Journal) -> int:
    """Evaluations that the trials of a journal have used of the budget."""
    return sum(1 if record.slopes is None else agents.SLOPES_COST for record in journal.records)


def describe(trials: Sequence[Trial]) -> str:
    """The best KL so far, in a few words."""
    best = best_trials(trials, 1)
    return f"best KL {best[0].score.kl:.4f}, first {trials[0].score.kl:.4f}" if best else "no score yet"
