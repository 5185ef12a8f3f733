"""How to write your own agent: this one climbs from the closed form, one step and one level at a time.

    python search.py --quick --agent examples.new_agent:HillClimb

An agent proposes schedules and receives their rewards (`agents.Agent`). `Ledger` keeps track of the budget and of the
best schedules.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agents import AgentContext, ProblemLike, Proposal
from agents.ledger import Ledger


class HillClimb:
    """Changes one random step of the best episode so far by one level, and keeps the change if it is better."""

    name = "examples.new_agent:HillClimb"

    def __init__(self, problem: ProblemLike, context: AgentContext) -> None:
        self._problem, self._ledger = problem, Ledger(context)
        self._generator = np.random.default_rng(context.seed)
        self._best, self._reward = (problem.middle,) * problem.steps, -np.inf

    def ask(self, count: int) -> list[Proposal]:
        """See `agents.Agent`."""
        for _ in range(100 if self._ledger.left else 0):
            actions = list(self._best)
            if np.isfinite(self._reward):
                step = int(self._generator.integers(self._problem.steps))
                level = actions[step] + self._generator.choice([-1, 1])
                actions[step] = int(np.clip(level, 0, self._problem.levels - 2))  # the last level is dense
            proposal = Proposal(self._problem.schedule(actions), tuple(actions))
            if self._ledger.add(proposal):
                return [proposal]
        return []

    def tell(self, proposals: Sequence[Proposal], rewards: Sequence[float]) -> None:
        """See `agents.Agent`."""
        self._ledger.close(proposals, rewards)
        for proposal, reward in zip(proposals, rewards, strict=True):
            if proposal.actions is not None and reward > self._reward:
                self._best, self._reward = proposal.actions, reward

    def recommend(self, count: int) -> list[Proposal]:
        """See `agents.Agent`."""
        return self._ledger.best(count)
