"""Protocol: what an agent is, and what it may know of the problem it works on.

Interfaces only. An agent proposes schedules and is told rewards; it never sees a model, a score or a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from agents.policy_file import SavedPolicy
from compression.refusal import Refusal
from compression.schedule import Schedule

__all__ = ["SLOPES_COST", "Agent", "AgentContext", "Learner", "ProblemLike", "Proposal", "SlopeAgent"]


class ProblemLike(Protocol):
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

    @property
    def names(self) -> tuple[str, ...]:
        """What each step decides about, such as "block_07" or "family_down"; all different."""

    @property
    def target_kept(self) -> float:
        """Kept fraction that no schedule of this task exceeds."""

    def at(self, target_kept: float) -> ProblemLike:
        """The same steps and levels with another target.

        Raises:
            ValueError: a target outside (0, 1], or below what the smallest options keep.
        """

    def kept(self, schedule: Schedule) -> float:
        """Kept fraction of a schedule."""

    def mask(self, prefix: Sequence[int] | NDArray[np.int64]) -> NDArray[np.bool_]:
        """Legal levels at the step after `prefix`, (steps taken,) -> (levels,); axes before those are kept."""

    def legalise(self, actions: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """The actions with the highest rung wherever dense is illegal, (steps taken,); axes before those are kept."""

    def observation(self, prefix: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """What that step can see, (steps taken,) -> (entries,), within [-1, 1]; axes before those are kept."""

    def forecast(self, actions: NDArray[np.int64]) -> NDArray[np.float64]:
        """Predicted cost of every step's group, (n, steps), for n complete episodes; an estimate, not an evaluation."""

    def schedule(self, actions: Sequence[int]) -> Schedule:
        """The schedule of a complete legal episode."""

    @property
    def membership(self) -> NDArray[np.float64]:
        """1 where a site (row) belongs to a step (column), else 0."""

    def weighted(self, offsets: NDArray[np.float64], residuals: NDArray[np.float64] | None = None) -> Schedule:
        """The schedule between the rungs: costs of every step's sites weighed by exp(offsets), (steps,).

        Residuals, (sites,), are added to the log weights of single sites.
        """

    def around(self, offsets: NDArray[np.float64], residuals: NDArray[np.float64] | None = None) -> ProblemLike:
        """The same task with `weighted(offsets, residuals)` in the place of the closed form."""

    def probe(self, schedule: Schedule) -> Schedule:
        """Each site a little larger, or a little smaller where it is dense: not a schedule that meets the target."""

    def gains(
        self, schedule: Schedule, probe: Schedule, slopes: Mapping[str, float]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What the step from `schedule` to `probe` is worth at each site, measured and predicted, (sites,) each."""

    def closed_form(self) -> Schedule:
        """The schedule of the all-middle episode."""

    def knapsack(self) -> Schedule:
        """The schedule of least predicted cost; the closed form is near it, but buys whole edges of convex hulls."""

    def uniform(self) -> Schedule:
        """The same kept fraction everywhere."""


@dataclass(frozen=True)
class AgentContext:
    """What an agent is given beside its task.

    Attributes:
        seed: of the agent's own generator, at least 0.
        budget: evaluations it may ask for, at least 0.
        shards: sets of data of equal size that a schedule can be measured on, at least 1.
        compression_weight: what the reward adds per unit of 1 − kept fraction, so that quality can be told from it.
        model: identity of the model that schedules are for; goes into saved policies.
        policy: what to start from in the place of the closed form; of the same agent, steps, ladder and subject, at
            any target.
    """

    seed: int
    budget: int
    shards: int = 1
    compression_weight: float = 1.0
    model: str = ""
    policy: SavedPolicy | None = None

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("budget", 0), ("shards", 1)):
            if getattr(self, name) < least:
                raise Refusal(f"{name} must be at least {least}, got {getattr(self, name)}")


SLOPES_COST = 4
"""Evaluations that one with slopes is charged for: it adds a backward pass, and another product a site."""


@dataclass(frozen=True)
class Proposal:
    """A schedule to evaluate.

    Attributes:
        actions: what led to it; None where it did not come from an episode.
        repeat: how often this schedule was measured before, 0 to shards − 1. Each repeat reads the next shard of the
            search data, counted from the one that the schedule's digest picks, and is paid for as an evaluation.
        probe: if given, the agent is told slopes too (`SlopeAgent`): by site, what the KL does to first order when the
            site alone takes its choice in this schedule.
    """

    schedule: Schedule
    actions: tuple[int, ...] | None
    repeat: int = 0
    probe: Schedule | None = None

    @property
    def cost(self) -> int:
        """Evaluations it is charged for."""
        return 1 if self.probe is None else SLOPES_COST


class Agent(Protocol):
    """Ask, evaluate, tell. The same seed and the same asks and tells in the same order give the same proposals.

    It may be asked while earlier proposals are not told yet, so that several evaluators are kept busy; its module says
    how it takes what comes late. Asked and told one proposal at a time it does as if it were asked and told batches.
    """

    @property
    def name(self) -> str:
        """As in `agents.NAMES`."""

    def ask(self, count: int) -> list[Proposal]:
        """At most `count` new proposals, never the same look at the same schedule twice.

        None means it has finished, or if some are not told yet, that it has to wait for one of them. The costs of all
        it ever proposes add up to its budget at most.

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


class SlopeAgent(Agent, Protocol):
    """An agent that asks for slopes."""

    def tell_slopes(self, proposal: Proposal, slopes: Mapping[str, float]) -> None:
        """Slopes of a proposal with a probe, in nats per token by site; called before `tell`. Empty for a failure."""


@runtime_checkable
class Learner(Protocol):
    """An agent with a policy that outlives it: what it saves can be given to another one in its `AgentContext`."""

    def saved_policy(self) -> SavedPolicy:
        """The policy as it is now."""
