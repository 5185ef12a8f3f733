"""Random search: draws every level uniformly from the legal ones. Every agent that learns should do better."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agents.ledger import Ledger
from agents.protocol import AgentContext, ProblemLike, Proposal

__all__ = ["RandomSearch"]

_TRIES = 100  # draws for a new schedule; if none is new, the space counts as exhausted


class RandomSearch:
    """Takes a random legal level at every step; draws again if the schedule was proposed before."""

    name = "random"

    def __init__(self, problem: ProblemLike, context: AgentContext) -> None:
        self._problem = problem
        self._generator = np.random.default_rng(context.seed)
        self._ledger = Ledger(context)
        self._finished = False

    def ask(self, count: int) -> list[Proposal]:
        """See `agents.Agent`."""
        self._ledger.check(count)
        proposals: list[Proposal] = []
        while len(proposals) < count and self._ledger.left and not self._finished:
            fresh = next(filter(self._ledger.add, (self._draw() for _ in range(_TRIES))), None)
            if fresh is None:
                self._finished = True
            else:
                proposals.append(fresh)
        return proposals

    def tell(self, proposals: Sequence[Proposal], rewards: Sequence[float]) -> None:
        """See `agents.Agent`. The agent learns nothing."""
        self._ledger.close(proposals, rewards)

    def recommend(self, count: int) -> list[Proposal]:
        """See `agents.Agent`. Ranks schedules by reward."""
        return self._ledger.best(count)

    def _draw(self) -> Proposal:
        actions: list[int] = []
        for _ in range(self._problem.steps):
            actions.append(int(self._generator.choice(np.flatnonzero(self._problem.mask(actions)))))
        return Proposal(self._problem.schedule(actions), tuple(actions))
