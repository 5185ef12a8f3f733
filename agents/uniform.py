"""Uniform: the same kept fraction at every site. The allocation of nearly all published low-rank work."""

from __future__ import annotations

from collections.abc import Sequence

from agents.ledger import Ledger
from agents.protocol import Proposal, Task

__all__ = ["Uniform"]


class Uniform:
    """Proposes the uniform allocation once and has finished."""

    name = "uniform"

    def __init__(self, task: Task, seed: int, budget: int) -> None:
        """`seed` is not used; a budget of 0 proposes nothing."""
        self._proposal = Proposal(task.uniform(), None)
        self._ledger = Ledger(min(1, budget))

    def ask(self, count: int) -> list[Proposal]:
        """See `agents.Agent`."""
        self._ledger.check(count)
        return [self._proposal] if self._ledger.left and self._ledger.add(self._proposal) else []

    def tell(self, proposals: Sequence[Proposal], rewards: Sequence[float]) -> None:
        """Nothing is learned."""
        self._ledger.close(proposals, rewards)

    def recommend(self, count: int) -> list[Proposal]:
        """See `agents.Agent`. By reward."""
        return self._ledger.best(count)
