"""Fixed: agents that propose one schedule known beforehand. No evaluation guides them."""

from __future__ import annotations

from collections.abc import Sequence

from agents.ledger import Ledger
from agents.protocol import Proposal, Task, Terms

__all__ = ["Fixed", "Lagrangian", "Uniform"]


class Fixed:
    """Proposes one schedule once and has finished."""

    name = "fixed"

    def __init__(self, proposal: Proposal, terms: Terms) -> None:
        """A budget of 0 proposes nothing."""
        self._proposal = proposal
        self._ledger = Ledger(terms)

    def ask(self, count: int) -> list[Proposal]:
        """See `agents.Agent`."""
        self._ledger.check(count)
        return [self._proposal] if self._ledger.left and self._ledger.add(self._proposal) else []

    def tell(self, proposals: Sequence[Proposal], rewards: Sequence[float]) -> None:
        """Nothing is learned."""
        self._ledger.close(proposals, rewards)

    def recommend(self, count: int) -> list[Proposal]:
        """See `agents.Agent`."""
        return self._ledger.best(count)


class Lagrangian(Fixed):
    """The closed-form allocation of least predicted cost."""

    name = "lagrangian"

    def __init__(self, task: Task, terms: Terms) -> None:
        super().__init__(Proposal(task.closed_form(), (task.middle,) * task.steps), terms)


class Uniform(Fixed):
    """The same kept fraction at every site."""

    name = "uniform"

    def __init__(self, task: Task, terms: Terms) -> None:
        super().__init__(Proposal(task.uniform(), None), terms)
