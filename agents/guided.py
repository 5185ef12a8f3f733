"""Guided: the gradient agent first, then another agent around what it found. `guided` goes on with REINFORCE.

Slopes say within a few evaluations how far the predicted worth of parameters is off, to first order and for the KL
alone. What they leave, a search by rewards may find: interactions at a distance, the other terms of the reward, groups
kept dense. So a share of the budget goes to `agents.gradient`. The rest goes to an agent whose problem has that outcome
instead of the closed form (`ProblemLike.around`); its episodes are offsets to it. `agents.portfolio` adds more agents.

Knows the gradient agent; the other one by its protocol only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from agents.gradient import Gradient
from agents.ledger import Ledger
from agents.protocol import SLOPES_COST, Agent, AgentContext, ProblemLike, Proposal
from agents.reinforce import Reinforce

__all__ = ["Guided", "GuidedSettings"]

Follower = Callable[[ProblemLike, AgentContext], Agent]


@dataclass(frozen=True)
class GuidedSettings:
    """What can be tuned."""

    lead: float = 0.5  # share of the budget that the gradient agent gets; it gains little after 100 evaluations
    follower: Follower = Reinforce  # makes the agent that gets the rest; it must propose episodes
    name: str = "guided"


class Guided:
    """See the module."""

    def __init__(self, problem: ProblemLike, context: AgentContext, settings: GuidedSettings | None = None) -> None:
        self.settings = settings or GuidedSettings()
        self._problem = problem
        self._context = context
        self._ledger = Ledger(context)
        lead = min(context.budget, SLOPES_COST * round(self.settings.lead * context.budget / SLOPES_COST))
        self._lead = Gradient(problem, replace(context, budget=lead))
        self._follower: Agent | None = None
        self._given: dict[tuple[str, int], Proposal] = {}  # the follower's own proposals, not told yet
        self._rewards: dict[tuple[str, int], float] = {}

    @property
    def name(self) -> str:
        """See `agents.Agent`."""
        return self.settings.name

    def ask(self, count: int) -> list[Proposal]:
        """See `agents.Agent`."""
        self._ledger.check(count)
        if not self._ledger.left:
            return []
        if self._follower is None:
            if proposals := self._lead.ask(count):
                return [proposal for proposal in proposals if self._ledger.add(proposal)]
            if not self._lead.settled:
                return []
            self._follow()
        assert self._follower is not None
        while batch := self._follower.ask(min(count, self._ledger.left)):
            fresh = [proposal for proposal in batch if self._ledger.add(proposal)]
            self._given |= {_key(proposal): proposal for proposal in fresh}
            for proposal in batch:  # a look that the lead has had is known
                if _key(proposal) not in self._given:
                    self._follower.tell([proposal], [self._rewards[_key(proposal)]])
            if fresh:
                return [replace(proposal, actions=None) for proposal in fresh]
        return []

    def tell_slopes(self, proposal: Proposal, slopes: Mapping[str, float]) -> None:
        """See `agents.SlopeAgent`."""
        self._lead.tell_slopes(proposal, slopes)

    def tell(self, proposals: Sequence[Proposal], rewards: Sequence[float]) -> None:
        """See `agents.Agent`."""
        self._ledger.close(proposals, rewards)
        for proposal, reward in zip(proposals, rewards, strict=True):
            self._rewards[_key(proposal)] = reward
            if self._follower is None:
                self._lead.tell([proposal], [reward])
            else:
                self._follower.tell([self._given.pop(_key(proposal))], [reward])

    def recommend(self, count: int) -> list[Proposal]:
        """See `agents.Agent`. The follower's, and among them what the lead believed best."""
        best = self._lead.recommend(1)
        follower = self._follower.recommend(count) if self._follower and self._rewards else []
        order = [*follower[:2], *best, *follower[2:]]
        found = {one.schedule.digest: replace(one, actions=None) for one in order}
        return list(found.values())[:count]

    def _follow(self) -> None:
        around = self._problem.around(self._lead.offsets, self._lead.residuals)
        # What the lead has looked at costs the follower nothing.
        context = replace(self._context, budget=self._ledger.left + len(self._rewards))
        self._follower = self.settings.follower(around, context)


def _key(proposal: Proposal) -> tuple[str, int]:
    return proposal.schedule.digest, proposal.repeat
