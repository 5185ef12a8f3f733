"""Runs the gradient agent first and then a second agent around its result; `guided` uses REINFORCE as the second.

Within a few evaluations, slopes show how far the predicted gains per parameter are off, but only to first order and for
the KL alone. A search by rewards can find what slopes miss: effects of large steps, the other terms of the reward, and
groups that should stay dense. The gradient agent therefore gets a share of the budget. The second agent, the follower,
gets the rest: its problem starts at the gradient agent's result instead of the closed form (`ProblemLike.around`), and
its episodes are offsets from there. `agents.portfolio` uses several agents as the follower.

Knows the gradient agent; knows the follower only by its protocol.
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
    """Settings of the combination."""

    lead: float = 0.5  # share of the budget for the gradient agent, which gains little after 100 evaluations
    follower: Follower = Reinforce  # makes the agent that gets the rest of the budget; it must propose episodes
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
        self._given: dict[tuple[str, int], Proposal] = {}  # the follower's proposals that have no reward yet
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
            for proposal in batch:  # the lead's evaluations need not be repeated
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
        """See `agents.Agent`. Puts the gradient agent's best schedule third, after the follower's two best."""
        best = self._lead.recommend(1)
        follower = self._follower.recommend(count) if self._follower and self._rewards else []
        order = [*follower[:2], *best, *follower[2:]]
        found = {one.schedule.digest: replace(one, actions=None) for one in order}
        return list(found.values())[:count]

    def _follow(self) -> None:
        around = self._problem.around(self._lead.offsets, self._lead.residuals)
        # The lead's evaluations cost the follower nothing, so its budget is larger by their number.
        context = replace(self._context, budget=self._ledger.left + len(self._rewards))
        self._follower = self.settings.follower(around, context)


def _key(proposal: Proposal) -> tuple[str, int]:
    return proposal.schedule.digest, proposal.repeat
