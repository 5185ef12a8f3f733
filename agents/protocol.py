"""Protocol: what an agent is, and what it may know of the problem it works on.

Interfaces only. An agent proposes schedules and is told rewards; it never sees a model, a score or a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from compression.schedule import Schedule

__all__ = ["Agent", "Proposal", "Task"]


class Task(Protocol):
    """An episode of `steps` choices among `levels` levels that ends in a schedule.

    The levels but the last are rungs of a ladder and always legal. The last one, dense, may be illegal; whether it is
    depends only on which earlier steps took it.
    """

    @property
    def steps(self) -> int:
        """Choices in an episode, at least 1."""

    @property
    def levels(self) -> int:
        """Levels of a choice, at least 2."""

    @property
    def middle(self) -> int:
        """The level that leaves the closed form as it is."""

    @property
    def offsets(self) -> NDArray[np.float64]:
        """Position of every level on the ladder, (levels,), ascending; 0 at `middle`, +inf for dense."""

    def mask(self, prefix: Sequence[int]) -> NDArray[np.bool_]:
        """Legal levels, (levels,), at the step after `prefix`."""

    def observation(self, prefix: Sequence[int]) -> NDArray[np.float32]:
        """What that step can see, entries within [-1, 1]."""

    def forecast(self, actions: NDArray[np.int64]) -> NDArray[np.float64]:
        """Predicted cost of every step's group, (n, steps), for n complete episodes; an estimate, not an evaluation."""

    def schedule(self, actions: Sequence[int]) -> Schedule:
        """The schedule of a complete legal episode."""

    def closed_form(self) -> Schedule:
        """The schedule of the all-middle episode."""

    def uniform(self) -> Schedule:
        """The same kept fraction everywhere."""


@dataclass(frozen=True)
class Proposal:
    """A schedule to evaluate, and the actions that led to it; None where it did not come from an episode."""

    schedule: Schedule
    actions: tuple[int, ...] | None


class Agent(Protocol):
    """Ask, evaluate, tell. The same seed and the same tells in the same order give the same proposals."""

    @property
    def name(self) -> str:
        """As in `agents.NAMES`."""

    def ask(self, count: int) -> list[Proposal]:
        """At most `count` new proposals, never one proposed before. None at all means that the agent has finished.

        Raises:
            ValueError: count below 1.
        """

    def tell(self, proposals: Sequence[Proposal], rewards: Sequence[float]) -> None:
        """Rewards of proposals asked for, each once, in any grouping; higher is better, NaN counts as a failure.

        Raises:
            ValueError: different numbers of proposals and rewards, or a proposal that was not asked for or told before.
        """

    def recommend(self, count: int) -> list[Proposal]:
        """At most `count` different proposals it believes best, best first; called after the last tell.

        They need not have been proposed before: an agent that learns may trust that more than single rewards.
        """
