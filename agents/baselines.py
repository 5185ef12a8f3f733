"""Baseline agents that each propose one schedule computed without any evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from agents.ledger import Ledger
from agents.protocol import AgentContext, ProblemLike, Proposal

__all__ = ["Fixed", "Knapsack", "Lagrangian", "Uniform"]


class Fixed:
    """Proposes one given schedule once and then finishes."""

    name = "fixed"

    def __init__(self, proposal: Proposal, context: AgentContext) -> None:
        """With a budget of 0 the agent proposes nothing."""
        self._proposal = proposal
        self._ledger = Ledger(context)

    def ask(self, count: int) -> list[Proposal]:
        """See `agents.Agent`."""
        self._ledger.check(count)
        return [self._proposal] if self._ledger.left and self._ledger.add(self._proposal) else []

    def tell(self, proposals: Sequence[Proposal], rewards: Sequence[float]) -> None:
        """See `agents.Agent`. The agent learns nothing."""
        self._ledger.close(proposals, rewards)

    def recommend(self, count: int) -> list[Proposal]:
        """See `agents.Agent`."""
        return self._ledger.best(count)


class Lagrangian(Fixed):
    """Proposes the closed form, the Lagrangian allocation by predicted cost."""

    name = "lagrangian"

    def __init__(self, problem: ProblemLike, context: AgentContext) -> None:
        super().__init__(Proposal(problem.closed_form(), (problem.middle,) * problem.steps), context)


class Knapsack(Fixed):
    """Proposes the allocation of least predicted cost, found exactly.

    `Lagrangian` follows the convex hulls of the sites' costs, best gain per parameter first, and then spends the
    remaining parameters on options that still fit. `Knapsack` also considers options above a hull and spends the last
    parameters optimally. If the costs are convex or nearly so, the two differ by a few steps of χ. Both trust the
    predicted costs.
    """

    name = "knapsack"

    def __init__(self, problem: ProblemLike, context: AgentContext) -> None:
        super().__init__(Proposal(problem.knapsack(), None), context)


class Uniform(Fixed):
    """Proposes the schedule with the same kept fraction at every site."""

    name = "uniform"

    def __init__(self, problem: ProblemLike, context: AgentContext) -> None:
        super().__init__(Proposal(problem.uniform(), None), context)
