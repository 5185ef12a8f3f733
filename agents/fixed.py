"""Fixed: agents that propose one schedule known beforehand. No evaluation guides them."""

from __future__ import annotations

from collections.abc import Sequence

from agents.ledger import Ledger
from agents.protocol import Proposal, Task

__all__ = ["Fixed", "Lagrangian", "Uniform"]


class Fixed:
    """Proposes one schedule once and has finished."""

    name = "fixed"

    def __init__(self, proposal: Proposal, budget: int) -> None:
        """A budget of 0 proposes nothing."""
        self._proposal = proposal
        self._ledger = Ledger(min(1, budget))

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
    """The closed-form allocation of least predicted cost. `seed` is not used."""

    name = "lagrangian"

    def __init__(self, task: Task, seed: int, budget: int) -> None:
        super().__init__(Proposal(task.closed_form(), (task.middle,) * task.steps), budget)


class Uniform(Fixed):
    """The same kept fraction at every site. `seed` is not used."""

    name = "uniform"

    def __init__(self, task: Task, seed: int, budget: int) -> None:
        super().__init__(Proposal(task.uniform(), None), budget)
