"""Random search: independent uniform choices among the legal levels. The bar every learner has to clear."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agents.ledger import Ledger
from agents.protocol import AgentContext, ProblemLike, Proposal

__all__ = ["RandomSearch"]

_TRIES = 100  # for a schedule not proposed before; then the space counts as exhausted


class RandomSearch:
    """Every step takes a legal level at random; schedules proposed before are drawn again."""

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
        """Nothing is learned."""
        self._ledger.close(proposals, rewards)

    def recommend(self, count: int) -> list[Proposal]:
        """See `agents.Agent`. By reward."""
        return self._ledger.best(count)

    def _draw(self) -> Proposal:
        actions: list[int] = []
        for _ in range(self._problem.steps):
            actions.append(int(self._generator.choice(np.flatnonzero(self._problem.mask(actions)))))
        return Proposal(self._problem.schedule(actions), tuple(actions))
