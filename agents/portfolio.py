"""Shares one budget among the strongest agents, which take turns.

The gradient agent gets the first half of the budget, as in `agents.guided`; then several agents, the members, take
turns searching around its result. Every member proposes as if it were alone and receives only the rewards of its own
proposals. The first round gives each member one slice of the budget, in whole batches. Every later slice goes to the
member with the best trials, measured by the mean of its `best` highest mean rewards; the earlier member wins a tie. A
member that has nothing left to propose is skipped. A schedule that several members propose is evaluated once; a member
that proposes it later receives the known reward at no cost to the budget.

At the end, a surrogate fitted to the trials of all members ranks the union of their recommendations.

Knows agents only by their protocol; the members must propose episodes.
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

Key = tuple[str, int]  # digest of a schedule, and repeat


@dataclass(frozen=True)
class TurnsSettings:
    """Settings of the turns; other values were not tried."""

    members: tuple[str, ...] = ("reinforce", "evolution")  # names of agents, in the order of the first round
    slice: int = 20  # evaluations per turn; a turn ends with the batch that reaches this number
    best: int = 3  # number of best schedules by which a member is judged


@dataclass
class _Member:
    """An agent with its proposals that have no reward yet, in the order in which it made them."""

    agent: Agent
    waiting: list[Proposal] = field(default_factory=list)
    rewards: dict[str, list[float]] = field(default_factory=dict)
    finished: bool = False

    def tell(self, known: dict[Key, float]) -> None:
        """Passes on the rewards known by now, in the order of the member's proposals."""
        told = [proposal for proposal in self.waiting if _key(proposal) in known]
        self.waiting = [proposal for proposal in self.waiting if _key(proposal) not in known]
        rewards = [known[_key(proposal)] for proposal in told]
        self.agent.tell(told, rewards)
        for proposal, reward in zip(told, rewards, strict=True):
            self.rewards.setdefault(proposal.schedule.digest, []).append(reward)

    def standing(self, best: int) -> float:
        """Mean of the `best` highest mean rewards; −inf if none is finite."""
        means = [float(np.mean(rewards)) for rewards in self.rewards.values()]
        finite = sorted(mean for mean in means if np.isfinite(mean))[-best:]
        return float(np.mean(finite)) if finite else -np.inf


def portfolio(problem: ProblemLike, context: AgentContext) -> Guided:
    """Makes the agent that the command line calls `portfolio`: `Guided` with `Turns` as the follower."""
    return Guided(problem, context, GuidedSettings(follower=Turns, name="portfolio"))


class Turns:
    """Agent that lets its members take turns, see the module.

    Members must propose episodes, which `gradient`, `guided` and `portfolio` do not.
    """

    name = "turns"

    def __init__(self, problem: ProblemLike, context: AgentContext, settings: TurnsSettings | None = None) -> None:
        """Makes the members.

        Raises:
            ValueError: there are no members, or a member is unknown or does not propose episodes.
        """
        from agents.registry import make  # imported here because the registry imports this module

        self.settings = settings or TurnsSettings()
        if not self.settings.members or not _WITHOUT_EPISODES.isdisjoint(self.settings.members):
            raise Refusal(f"members must be agents that propose episodes, at least one; got {self.settings.members}")
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
        self._turn = 0  # number of slices begun
        self._at: _Member | None = None
        self._slice_left = 0

    def ask(self, count: int) -> list[Proposal]:
        """See `agents.Agent`. Returns at most the rest of a member's batch."""
        self._ledger.check(count)
        while not self._planned and self._ledger.left and not all(member.finished for member in self._members):
            self._plan()
        given, self._planned = self._planned[:count], self._planned[count:]
        return given

    def tell(self, proposals: Sequence[Proposal], rewards: Sequence[float]) -> None:
        """See `agents.Agent`. The members receive the rewards before the next batch is planned."""
        self._ledger.close(proposals, rewards)
        for proposal, reward in zip(proposals, rewards, strict=True):
            self._known[_key(proposal)] = float(reward)
            if proposal.actions is not None:
                self._actions.append(proposal.actions)
                self._rewards.append(float(reward))

    def recommend(self, count: int) -> list[Proposal]:
        """See `agents.Agent`. Ranks the members' recommendations by the reward that the surrogate predicts."""
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
        """Plans one batch of the current member; rewards known already reach the member when the next is planned."""
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
        """Picks each member once, then always the member of highest standing."""
        turn, self._turn = self._turn, self._turn + 1
        if turn < len(self._members) and not self._members[turn].finished:
            return self._members[turn]
        able = [member for member in self._members if not member.finished]
        return max(able, key=lambda member: member.standing(self.settings.best))


def _key(proposal: Proposal) -> Key:
    return proposal.schedule.digest, proposal.repeat
