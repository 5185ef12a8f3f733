"""Batched: what agents share that plan several proposals at once and learn between plans.

Knows the ask/tell contract, and what was told of every schedule; not how proposals come about.
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
    """What is known of one schedule: the levels that led to it, and the reward of every look told so far."""

    levels: tuple[int, ...]
    rewards: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Mean reward; −inf before the first, or where a look failed."""
        mean = float(np.mean(self.rewards)) if self.rewards else -np.inf
        return mean if np.isfinite(mean) else -np.inf


class BatchAgent(ABC):
    """Gives at most the rest of a batch; the next one is planned from what is told by then.

    Asked for more before all of a batch is told, it does not wait: then the next batch is planned without what is under
    way, which counts from the batch after it on. So with n evaluators a batch lacks at most n − 1 rewards of earlier
    ones. A subclass fills a batch in `_plan`, by `_enter`. A batch that stays empty with nothing under way ends the
    search.
    """

    name: str

    def __init__(self, problem: ProblemLike, context: AgentContext) -> None:
        """Nothing proposed yet."""
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
        """See `agents.Agent`. Learning waits for the next batch."""
        self._ledger.close(proposals, rewards)
        for proposal, reward in zip(proposals, rewards, strict=True):
            assert proposal.actions is not None
            record = self.records.setdefault(proposal.schedule.digest, Record(proposal.actions))
            record.rewards.append(float(reward))

    def recommend(self, count: int) -> list[Proposal]:
        """See `agents.Agent`. By mean reward."""
        return self._ledger.best(count)

    @property
    def trials(self) -> tuple[Levels, NDArray[np.float64]]:
        """Levels (n, steps) and reward (n,) of every look told, schedule by schedule."""
        pairs = [(record.levels, reward) for record in self.records.values() for reward in record.rewards]
        levels = np.array([levels for levels, _ in pairs], dtype=np.int64).reshape(-1, self._problem.steps)
        return levels, np.array([reward for _, reward in pairs], dtype=np.float64)

    def record(self, proposal: Proposal) -> Record:
        """What is known of a proposal's schedule."""
        return self.records.get(proposal.schedule.digest, Record(proposal.actions or ()))

    @abstractmethod
    def _plan(self) -> None:
        """Fill the batch."""

    def _proposal(self, levels: Levels) -> Proposal:
        actions = tuple(levels.tolist())
        return Proposal(self._problem.schedule(actions), actions)

    def _enter(self, proposal: Proposal) -> bool:
        """Add to the batch unless the budget is spent or the look was proposed before; whether it was added."""
        entered = self._ledger.left > 0 and self._ledger.add(proposal)
        if entered:
            self._planned.append(proposal)
        return entered

    def _believed(self, value: Callable[[Levels], NDArray[np.float64]]) -> Levels:
        """Different episodes told so far, (n, steps), those of the highest value first."""
        levels = np.unique(self.trials[0], axis=0)
        return levels[np.argsort(-value(levels), kind="stable")]

    def _distinct(self, rows: Levels, count: int) -> list[Proposal]:
        """Proposals of the first `count` different schedules among episodes (n, steps)."""
        found: dict[str, Proposal] = {}
        for levels in rows:
            if len(found) < count:
                proposal = self._proposal(levels)
                found.setdefault(proposal.schedule.digest, proposal)
        return list(found.values())
