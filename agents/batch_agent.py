"""Base class of the agents that plan proposals in batches and learn between batches.

Knows the ask/tell contract and the rewards of every schedule; does not know how proposals are chosen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from agents.ledger import Ledger
from agents.protocol import AgentContext, ProblemLike, Proposal

__all__ = ["BatchAgent", "Record"]

Levels = NDArray[np.int64]


@dataclass
class Record:
    """The levels of the first episode that led to a schedule, and the rewards of its evaluations so far."""

    levels: tuple[int, ...]
    rewards: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Mean reward; −inf before the first reward or if an evaluation failed."""
        mean = float(np.mean(self.rewards)) if self.rewards else -np.inf
        return mean if np.isfinite(mean) else -np.inf


class BatchAgent(ABC):
    """Hands out one batch at a time and plans the next batch from the rewards known by then.

    `ask` returns at most the rest of the current batch. It does not wait for missing rewards: if it is called before
    the whole batch has its rewards, the next batch is planned without the missing ones, which count from the batch
    after that. With n evaluators, a batch is therefore planned without at most n − 1 rewards of earlier batches. A
    subclass implements `_plan` and fills the batch with `_enter`. If the batch stays empty and no reward is
    outstanding, the agent has finished.
    """

    name: str

    def __init__(self, problem: ProblemLike, context: AgentContext) -> None:
        """Starts without proposals."""
        self.records: dict[str, Record] = {}
        self._problem = problem
        self._context = context
        self._generator = np.random.default_rng(context.seed)
        self._ledger = Ledger(context)
        self._planned: list[Proposal] = []
        self._finished = False

    def ask(self, count: int) -> list[Proposal]:
        """See `agents.Agent`."""
        self._ledger.check(count)
        if not self._planned and not self._finished and self._ledger.left:
            self._plan()
        self._finished = not self._planned and not (self._ledger.waits and self._ledger.left)
        given, self._planned = self._planned[:count], self._planned[count:]
        return given

    def tell(self, proposals: Sequence[Proposal], rewards: Sequence[float]) -> None:
        """See `agents.Agent`. The agent learns from the rewards when it plans the next batch."""
        self._ledger.close(proposals, rewards)
        for proposal, reward in zip(proposals, rewards, strict=True):
            record = self.records.setdefault(proposal.schedule.digest, Record(self._levels_of(proposal)))
            record.rewards.append(float(reward))

    def recommend(self, count: int) -> list[Proposal]:
        """See `agents.Agent`. Ranks schedules by mean reward."""
        return self._ledger.best(count)

    @property
    def trials(self) -> tuple[Levels, NDArray[np.float64]]:
        """Levels (n, steps) and reward (n,) of every evaluation with a reward, grouped by schedule."""
        pairs = [(record.levels, reward) for record in self.records.values() for reward in record.rewards]
        levels = np.array([levels for levels, _ in pairs], dtype=np.int64).reshape(-1, self._problem.steps)
        return levels, np.array([reward for _, reward in pairs], dtype=np.float64)

    def record(self, proposal: Proposal) -> Record:
        """The record of a proposal's schedule; empty before the first reward."""
        return self.records.get(proposal.schedule.digest, Record(self._levels_of(proposal)))

    @abstractmethod
    def _plan(self) -> None:
        """Fill the batch."""

    def _levels_of(self, proposal: Proposal) -> tuple[int, ...]:
        """The levels of the episode that led to a proposal."""
        return proposal.actions or ()

    def _proposal(self, levels: Levels) -> Proposal:
        actions = tuple(levels.tolist())
        return Proposal(self._problem.schedule(actions), actions)

    def _enter(self, proposal: Proposal) -> bool:
        """Adds a proposal to the batch; returns False if the budget is spent or the ledger refuses it."""
        entered = self._ledger.left > 0 and self._ledger.add(proposal)
        if entered:
            self._planned.append(proposal)
        return entered

    def _believed(self, value: Callable[[Levels], NDArray[np.float64]]) -> Levels:
        """The distinct episodes with a reward, (n, steps), sorted by `value`, highest first."""
        levels = np.unique(self.trials[0], axis=0)
        return levels[np.argsort(-value(levels), kind="stable")]

    def _distinct(self, rows: Levels, count: int) -> list[Proposal]:
        """Proposals for the first `count` different schedules among the episodes `rows`, (n, steps)."""
        found: dict[str, Proposal] = {}
        for levels in rows:
            if len(found) < count:
                proposal = self._proposal(levels)
                found.setdefault(proposal.schedule.digest, proposal)
        return list(found.values())
