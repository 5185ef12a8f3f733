"""Defines what an agent must implement and what it may know about the problem that it works on.

Contains interfaces only. An agent proposes schedules and receives rewards; it never sees a model, a score or a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from agents.policy_file import SavedPolicy
from compression.allocation.price_table import Tradeoff
from compression.refusal import Refusal
from compression.schedule import Schedule

__all__ = ["SLOPES_COST", "Agent", "AgentContext", "Learner", "ProblemLike", "Proposal", "SlopeAgent"]


class ProblemLike(Protocol):
    """An episode of `steps` choices among `levels` levels that ends in a schedule.

    All levels except the last are the rungs of a ladder and are always legal. The last level, dense, may be illegal;
    whether it is depends only on which earlier steps chose dense.
    """

    @property
    def steps(self) -> int:
        """Number of choices in an episode, at least 1."""

    @property
    def levels(self) -> int:
        """Number of levels to choose from at each step, at least 2."""

    @property
    def middle(self) -> int:
        """The level that leaves the closed-form allocation unchanged."""

    @property
    def offsets(self) -> NDArray[np.float64]:
        """Position of every level on the ladder, (levels,), ascending; 0 at `middle`, +inf for dense."""

    @property
    def names(self) -> tuple[str, ...]:
        """The group of sites that each step decides about, such as "block_07" or "family_down"; names are unique."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the rows of the menu: units of sites that a bond joins, and single sites. Called sites below."""

    @property
    def target_kept(self) -> float:
        """Kept fraction that no schedule of this problem exceeds."""

    def at(self, target_kept: float) -> ProblemLike:
        """Returns a problem with the same steps and levels and another target.

        Raises:
            ValueError: the target is outside (0, 1], or below the kept fraction of the smallest options.
        """

    def kept(self, schedule: Schedule) -> float:
        """Kept fraction of a schedule."""

    def mask(self, prefix: Sequence[int] | NDArray[np.int64]) -> NDArray[np.bool_]:
        """Legal levels at the step after `prefix`, (..., steps taken) -> (..., levels)."""

    def legalise(self, actions: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Replaces every illegal dense choice with the highest rung, (..., steps taken) -> (..., steps taken)."""

    def observation(self, prefix: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Observation at the step after `prefix`, (..., steps taken) -> (..., entries), within [-1, 1]."""

    def forecast(self, actions: NDArray[np.int64]) -> NDArray[np.float64]:
        """Predicted cost of every step's group for n complete episodes, (n, steps); no evaluation is made."""

    def forecast_sites(self, actions: NDArray[np.int64]) -> NDArray[np.float64]:
        """Predicted cost of every site for n complete episodes, (n, steps) -> (n, sites); no evaluation is made."""

    def schedule(self, actions: Sequence[int]) -> Schedule:
        """The schedule of a complete legal episode."""

    @property
    def membership(self) -> NDArray[np.float64]:
        """1 where a site (row) belongs to a step (column), else 0."""

    def weighted(self, offsets: NDArray[np.float64], residuals: NDArray[np.float64] | None = None) -> Schedule:
        """The schedule for real-valued offsets: each step's predicted site costs are multiplied by exp(offsets).

        Args:
            offsets: log weight of each step, (steps,); values between the rungs are allowed.
            residuals: added to the log weights of single sites, (sites,); None adds nothing.
        """

    def around(self, offsets: NDArray[np.float64], residuals: NDArray[np.float64] | None = None) -> ProblemLike:
        """Returns the same problem with `weighted(offsets, residuals)` replacing the closed form."""

    def costs(self, schedule: Schedule) -> NDArray[np.float64]:
        """Predicted cost of every site in a schedule, (sites,), nats per token."""

    def tradeoff(self, log_weights: NDArray[np.float64]) -> Tradeoff:
        """Predicted cost of every site for n allocations by log weights, (n, sites), and its derivatives."""

    def probe(self, schedule: Schedule) -> Schedule:
        """Makes each site a little larger, or a little smaller if it is dense; the result may miss the target."""

    def gains(
        self, schedule: Schedule, probe: Schedule, slopes: Mapping[str, float]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Measured and predicted reduction in cost when each site goes from `schedule` to `probe`, (sites,) each."""

    def closed_form(self) -> Schedule:
        """The schedule of the all-middle episode."""

    def knapsack(self) -> Schedule:
        """The schedule of least predicted cost; the closed form is only near it, as it moves along convex hulls."""

    def uniform(self) -> Schedule:
        """The schedule with the same kept fraction at every site."""


@dataclass(frozen=True)
class AgentContext:
    """Settings that an agent receives in addition to its problem.

    Attributes:
        seed: seed of the agent's own generator, at least 0.
        budget: evaluations that the agent may ask for, at least 0.
        shards: number of shards, sets of data of equal size on which a schedule can be measured, at least 1.
        compression_weight: reward per unit of 1 − kept fraction; subtract that term from a reward to get the quality.
        model: identity of the model that the schedules are for; written into saved policies.
        policy: saved policy to start from instead of the closed form. It must come from the same agent, steps, ladder
            and model; its target may differ.
    """

    seed: int
    budget: int
    shards: int = 1
    compression_weight: float = 1.0
    model: str = ""
    policy: SavedPolicy | None = None

    def shard(self, schedule: Schedule, repeat: int) -> int:
        """The shard that a measurement of `schedule` reads, 0 to shards − 1."""
        return schedule.shard(repeat, self.shards)

    def repeat(self, schedule: Schedule, shard: int) -> int:
        """The `Proposal.repeat` with which a measurement of `schedule` reads a shard."""
        return (shard - schedule.shard(0, self.shards)) % self.shards

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("budget", 0), ("shards", 1)):
            if getattr(self, name) < least:
                raise Refusal(f"{name} must be at least {least}, got {getattr(self, name)}")


SLOPES_COST = 4
"""Evaluations charged for one evaluation with slopes: it adds a backward pass and one more product per site."""


@dataclass(frozen=True)
class Proposal:
    """A schedule to evaluate.

    Attributes:
        actions: the episode that leads to the schedule; None if the schedule does not come from an episode.
        repeat: which measurement of this schedule this is, 0 to shards − 1. Repeat 0 reads the shard of the search
            data that the schedule's digest picks, each further repeat the next shard; each is charged as an evaluation.
        probe: if given, the agent also receives slopes (`SlopeAgent`): for each site, the first-order change of the KL
            when only that site takes its choice in the probe.
    """

    schedule: Schedule
    actions: tuple[int, ...] | None
    repeat: int = 0
    probe: Schedule | None = None

    @property
    def cost(self) -> int:
        """Number of evaluations that are charged for the proposal."""
        return 1 if self.probe is None else SLOPES_COST


class Agent(Protocol):
    """Proposes schedules (`ask`) and learns from their rewards (`tell`).

    The same seed, with the same calls of `ask` and `tell` in the same order, gives the same proposals. To keep several
    evaluators busy, `ask` may be called before the rewards of earlier proposals are known; each agent's module says
    how it handles late rewards. Asking and telling one proposal at a time gives the same search as doing so in batches.
    """

    @property
    def name(self) -> str:
        """The agent's name, as in `agents.NAMES`."""

    def ask(self, count: int) -> list[Proposal]:
        """Returns at most `count` new proposals; the same schedule with the same `repeat` is never proposed twice.

        An empty list means that the agent has finished or, while rewards are outstanding, that it must wait for one.
        The costs of all its proposals add up to at most its budget.

        Raises:
            ValueError: count is below 1.
        """

    def tell(self, proposals: Sequence[Proposal], rewards: Sequence[float]) -> None:
        """Reports the reward of each proposal once, in any grouping; higher is better, and NaN means a failure.

        Raises:
            ValueError: the numbers of proposals and rewards differ, or a proposal was never asked for or was already
                told.
        """

    def recommend(self, count: int) -> list[Proposal]:
        """Returns at most `count` different proposals that the agent believes best, best first, after the last `tell`.

        They may be new: an agent that learns may trust its model of the rewards more than single rewards.
        """


class SlopeAgent(Agent, Protocol):
    """An agent that uses slopes of the KL."""

    def tell_slopes(self, proposal: Proposal, slopes: Mapping[str, float]) -> None:
        """Reports the slopes of a proposal with a probe, nats per token by site, before `tell`; empty for a failure."""


@runtime_checkable
class Learner(Protocol):
    """An agent whose learned policy can be saved; another agent can continue it through `AgentContext.policy`."""

    def saved_policy(self) -> SavedPolicy:
        """Returns the current policy."""
