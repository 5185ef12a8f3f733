"""Ledger: the bookkeeping all agents share. Which schedules are proposed, which are told, and how many may follow."""

from __future__ import annotations

import math
from collections.abc import Sequence

from agents.protocol import Proposal

__all__ = ["Ledger"]


class Ledger:
    """Counts proposals against a budget and refuses what breaks the ask/tell contract."""

    def __init__(self, budget: int) -> None:
        """`budget`: proposals that may be made in all, at least 0. Raises ValueError below."""
        if budget < 0:
            raise ValueError(f"budget must be at least 0, got {budget}")
        self.budget = budget
        self._proposed: set[str] = set()
        self._open: set[str] = set()
        self._told: list[tuple[float, Proposal]] = []

    @property
    def left(self) -> int:
        """Proposals that may still be made."""
        return self.budget - len(self._proposed)

    def check(self, count: int) -> None:
        """Raises ValueError for a count below 1."""
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")

    def add(self, proposal: Proposal) -> bool:
        """Enter a proposal; False if its schedule was proposed before."""
        digest = proposal.schedule.digest
        if digest in self._proposed:
            return False
        self._proposed.add(digest)
        self._open.add(digest)
        return True

    def close(self, proposals: Sequence[Proposal], rewards: Sequence[float]) -> None:
        """Mark proposals as told. Raises ValueError for what was not asked for, told before, or lacks a reward."""
        if len(proposals) != len(rewards):
            raise ValueError(f"every proposal needs one reward, got {len(proposals)} and {len(rewards)}")
        for proposal in proposals:
            if proposal.schedule.digest not in self._open:
                raise ValueError(f"schedule {proposal.schedule.digest[:12]} was not asked for, or told before")
            self._open.remove(proposal.schedule.digest)
        self._told += [(float(reward), proposal) for proposal, reward in zip(proposals, rewards, strict=True)]

    def best(self, count: int) -> list[Proposal]:
        """The `count` proposals told with the highest reward, best first; ties go to the earlier, NaN is left out."""
        told = [pair for pair in self._told if not math.isnan(pair[0])]
        return [proposal for _, proposal in sorted(told, key=lambda pair: -pair[0])[:count]]
