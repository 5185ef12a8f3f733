"""Ledger: the bookkeeping all agents share. Which looks are proposed, which are told, and how many may follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from agents.protocol import AgentContext, Proposal
from compression.refusal import Refusal

__all__ = ["Ledger"]


class Ledger:
    """Counts evaluations against a budget and refuses what breaks the ask/tell contract."""

    def __init__(self, context: AgentContext) -> None:
        """Counts against `context.budget`."""
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
        """Whether something proposed is not told yet."""
        return bool(self._open)

    def is_open(self, proposal: Proposal) -> bool:
        """Whether this look was proposed and is not told yet."""
        return (proposal.schedule.digest, proposal.repeat) in self._open

    def check(self, count: int) -> None:
        """Raises ValueError for a count below 1."""
        if count < 1:
            raise Refusal(f"count must be at least 1, got {count}")

    def add(self, proposal: Proposal) -> bool:
        """Enter a proposal; False if this look at its schedule was proposed before, or there is no such look."""
        key = proposal.schedule.digest, proposal.repeat
        if key in self._proposed or not 0 <= proposal.repeat < self._context.shards:
            return False
        self._proposed.add(key)
        self._spent += proposal.cost
        self._open.add(key)
        return True

    def close(self, proposals: Sequence[Proposal], rewards: Sequence[float]) -> None:
        """Mark proposals as told. Raises ValueError for what was not asked for, told before, or lacks a reward."""
        if len(proposals) != len(rewards):
            raise Refusal(f"every proposal needs one reward, got {len(proposals)} and {len(rewards)}")
        for proposal, reward in zip(proposals, rewards, strict=True):
            digest = proposal.schedule.digest
            if (digest, proposal.repeat) not in self._open:
                raise Refusal(f"schedule {digest[:12]} was not asked for, or told before")
            self._open.remove((digest, proposal.repeat))
            self._told.setdefault(digest, (proposal, []))[1].append(float(reward))

    def best(self, count: int) -> list[Proposal]:
        """The `count` schedules told with the highest mean reward, best first.

        Ties go to the earlier; a schedule with a failed look is left out.
        """
        means = [(fmean(rewards), proposal) for proposal, rewards in self._told.values()]
        means = [pair for pair in means if not math.isnan(pair[0])]
        return [proposal for _, proposal in sorted(means, key=lambda pair: -pair[0])[:count]]
