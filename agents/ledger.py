"""Keeps the books of an agent: which measurements are proposed, which have a reward, and how much budget is left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from agents.protocol import AgentContext, Proposal
from compression.refusal import Refusal

__all__ = ["Ledger"]


class Ledger:
    """Counts evaluations against a budget and refuses calls that break the ask/tell contract."""

    def __init__(self, context: AgentContext) -> None:
        """Starts with the whole `context.budget` left."""
        self._context = context
        self._proposed: set[tuple[str, int]] = set()
        self._spent = 0
        self._open: set[tuple[str, int]] = set()
        self._told: dict[str, tuple[Proposal, list[float]]] = {}

    @property
    def left(self) -> int:
        """Evaluations that may still be asked for."""
        return self._context.budget - self._spent

    @property
    def waits(self) -> bool:
        """Whether the reward of some proposal is not known yet."""
        return bool(self._open)

    def is_open(self, proposal: Proposal) -> bool:
        """Whether this proposal was made and its reward is not known yet."""
        return (proposal.schedule.digest, proposal.repeat) in self._open

    def check(self, count: int) -> None:
        """Raises ValueError for a count below 1."""
        if count < 1:
            raise Refusal(f"count must be at least 1, got {count}")

    def add(self, proposal: Proposal) -> bool:
        """Enters a proposal; returns False if its schedule was proposed with this `repeat`, or `repeat` ≥ shards."""
        key = proposal.schedule.digest, proposal.repeat
        if key in self._proposed or not 0 <= proposal.repeat < self._context.shards:
            return False
        self._proposed.add(key)
        self._spent += proposal.cost
        self._open.add(key)
        return True

    def close(self, proposals: Sequence[Proposal], rewards: Sequence[float]) -> None:
        """Records the rewards of proposals.

        Raises:
            ValueError: the numbers of proposals and rewards differ, or a proposal was never asked for or was already
                told.
        """
        if len(proposals) != len(rewards):
            raise Refusal(f"every proposal needs one reward, got {len(proposals)} and {len(rewards)}")
        for proposal, reward in zip(proposals, rewards, strict=True):
            digest = proposal.schedule.digest
            if (digest, proposal.repeat) not in self._open:
                raise Refusal(f"schedule {digest[:12]} was never asked for, or its reward was told before")
            self._open.remove((digest, proposal.repeat))
            self._told.setdefault(digest, (proposal, []))[1].append(float(reward))

    def best(self, count: int) -> list[Proposal]:
        """The `count` schedules with the highest mean reward, best first.

        The earlier schedule wins a tie; schedules with a failed evaluation are left out.
        """
        means = [(fmean(rewards), proposal) for proposal, rewards in self._told.values()]
        means = [pair for pair in means if not math.isnan(pair[0])]
        return [proposal for _, proposal in sorted(means, key=lambda pair: -pair[0])[:count]]
