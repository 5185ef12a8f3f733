"""Portfolio: the strongest agents in turn on one budget.

The gradient agent has the first half, as in `agents.guided`; then several agents take turns around what it found. Every
member of those proposes as if it were alone, and is told the rewards of what it proposed and of nothing else. The first
round gives each member a slice of the budget, in whole batches; every later slice goes to the member whose best trials
look best: the mean of its `best` highest mean rewards, ties to the earlier member. A member with nothing left to
propose is passed over. What several members propose is evaluated once; who comes later is told the reward that is
known, at no cost to the budget.

In the end a surrogate fitted to the trials of all members ranks the union of what they recommend.

Knows agents by their protocol only, and asks for those that propose episodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from agents.gradient import Gradient
from agents.guided import Guided, GuidedSettings
from agents.ledger import Ledger
from agents.protocol import Agent, AgentContext, ProblemLike, Proposal
from agents.surrogate import Surrogate, without_outliers
from compression.refusal import Refusal

__all__ = ["Turns", "TurnsSettings", "portfolio"]

_WITHOUT_EPISODES = frozenset({Gradient.name, GuidedSettings.name, "portfolio"})

Key = tuple[str, int]  # digest of a schedule, and look


@dataclass(frozen=True)
class TurnsSettings:
    """What can be tuned; nothing was varied."""

    members: tuple[str, ...] = ("reinforce", "evolution")  # names of agents, in the order of the first round
    slice: int = 20  # evaluations after which the turn ends, with the batch that reaches them
    best: int = 3  # schedules that a member is judged by


@dataclass
class _Member:
    """An agent, and what it waits for: proposals in the order it made them."""

    agent: Agent
    waiting: list[Proposal] = field(default_factory=list)
    rewards: dict[str, list[float]] = field(default_factory=dict)
    finished: bool = False

    def tell(self, known: dict[Key, float]) -> None:
        """Pass on what is known by now, in the order of its proposals."""
        told = [proposal for proposal in self.waiting if _key(proposal) in known]
        self.waiting = [proposal for proposal in self.waiting if _key(proposal) not in known]
        rewards = [known[_key(proposal)] for proposal in told]
        self.agent.tell(told, rewards)
        for proposal, reward in zip(told, rewards, strict=True):
            self.rewards.setdefault(proposal.schedule.digest, []).append(reward)

    def standing(self, best: int) -> float:
        """Mean of the `best` highest mean rewards; −inf without a finite one."""
        means = [float(np.mean(rewards)) for rewards in self.rewards.values()]
        finite = sorted(mean for mean in means if np.isfinite(mean))[-best:]
        return float(np.mean(finite)) if finite else -np.inf


def portfolio(problem: ProblemLike, context: AgentContext) -> Guided:
    """The agent that the command line calls so."""
    return Guided(problem, context, GuidedSettings(follower=Turns, name="portfolio"))


class Turns:
    """Members in turn, see the module; an agent in itself.

    Members must propose episodes, which `gradient`, `guided` and `portfolio` do not.
    """

    name = "turns"

    def __init__(self, problem: ProblemLike, context: AgentContext, settings: TurnsSettings | None = None) -> None:
        """Raises ValueError without members, or for one that is unknown or proposes no episodes."""
        from agents.registry import make  # the registry knows this agent, too

        self.settings = settings or TurnsSettings()
        if not self.settings.members or not _WITHOUT_EPISODES.isdisjoint(self.settings.members):
            raise Refusal(f"members must be agents that propose episodes, at least one, got {self.settings.members}")
        self._problem = problem
        self._ledger = Ledger(context)
        self._members = [
            _Member(make(name, problem, replace(context, seed=context.seed + number, policy=None)))
            for number, name in enumerate(self.settings.members)
        ]
        self._known: dict[Key, float] = {}
        self._actions: list[tuple[int, ...]] = []
        self._rewards: list[float] = []
        self._planned: list[Proposal] = []
        self._turn = 0  # slices begun
        self._at: _Member | None = None
        self._slice_left = 0

    def ask(self, count: int) -> list[Proposal]:
        """See `agents.Agent`. Gives at most the rest of a member's batch."""
        self._ledger.check(count)
        while not self._planned and self._ledger.left and not all(member.finished for member in self._members):
            self._plan()
        given, self._planned = self._planned[:count], self._planned[count:]
        return given

    def tell(self, proposals: Sequence[Proposal], rewards: Sequence[float]) -> None:
        """See `agents.Agent`. Members are told before they are asked again."""
        self._ledger.close(proposals, rewards)
        for proposal, reward in zip(proposals, rewards, strict=True):
            self._known[_key(proposal)] = float(reward)
            if proposal.actions is not None:
                self._actions.append(proposal.actions)
                self._rewards.append(float(reward))

    def recommend(self, count: int) -> list[Proposal]:
        """See `agents.Agent`. The union of the members' recommendations, by what the surrogate expects of them."""
        if len(self._rewards) < 3:
            return self._ledger.best(count)
        union: dict[str, tuple[Proposal, tuple[int, ...]]] = {}
        for member in self._members:
            member.tell(self._known)
            for proposal in member.agent.recommend(count):
                if proposal.actions is not None:
                    union.setdefault(proposal.schedule.digest, (proposal, proposal.actions))
        if not union:
            return self._ledger.best(count)
        surrogate = Surrogate(self._problem)
        surrogate.fit(np.array(self._actions, dtype=np.int64), without_outliers(np.array(self._rewards)))
        proposals = [proposal for proposal, _ in union.values()]
        expected = surrogate(np.array([actions for _, actions in union.values()], dtype=np.int64))
        return [proposals[index] for index in np.argsort(-expected, kind="stable")[:count]]

    def _plan(self) -> None:
        """One batch of the member whose turn it is; what is known of it already is told with the next plan."""
        for member in self._members:
            member.tell(self._known)
        if self._at is None or self._slice_left <= 0 or self._at.finished:
            self._at = self._next()
            self._slice_left = self.settings.slice
        batch = self._at.agent.ask(min(self.settings.slice, self._ledger.left))
        self._at.finished = not batch
        self._at.waiting += batch
        self._planned = [proposal for proposal in batch if self._ledger.add(proposal)]
        self._slice_left -= len(self._planned)

    def _next(self) -> _Member:
        """Each member once, then always the one that stands best."""
        turn, self._turn = self._turn, self._turn + 1
        if turn < len(self._members) and not self._members[turn].finished:
            return self._members[turn]
        able = [member for member in self._members if not member.finished]
        return max(able, key=lambda member: member.standing(self.settings.best))


def _key(proposal: Proposal) -> Key:
    return proposal.schedule.digest, proposal.repeat
