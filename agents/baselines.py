"""Fixed: agents that propose one schedule known beforehand. No evaluation guides them."""

from __future__ import annotations

from collections.abc import Sequence

from agents.ledger import Ledger
from agents.protocol import AgentContext, ProblemLike, Proposal

__all__ = ["Fixed", "Knapsack", "Lagrangian", "Uniform"]


class Fixed:
    """Proposes one schedule once and has finished."""

    name = "fixed"

    def __init__(self, proposal: Proposal, context: AgentContext) -> None:
        """A budget of 0 proposes nothing."""
        self._proposal = proposal
        self._ledger = Ledger(context)

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

    def __init__(self, problem: ProblemLike, context: AgentContext) -> None:
        super().__init__(Proposal(problem.closed_form(), (problem.middle,) * problem.steps), context)


class Knapsack(Fixed):
    """The allocation of least predicted cost, exactly.

    `Lagrangian` buys edges of the convex hulls of the sites' costs, best gain per parameter first, and fills up with
    what still fits; this also takes options above a hull, and spends the last parameters as well as can be. On costs
    that are convex, or nearly, the two differ by a few steps of χ; both trust the predicted costs.
    """

    name = "knapsack"

    def __init__(self, problem: ProblemLike, context: AgentContext) -> None:
        super().__init__(Proposal(problem.knapsack(), None), context)


class Uniform(Fixed):
    """The same kept fraction at every site."""

    name = "uniform"

    def __init__(self, problem: ProblemLike, context: AgentContext) -> None:
        super().__init__(Proposal(problem.uniform(), None), context)
