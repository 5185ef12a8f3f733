"""Elitist evolutionary search by level switches that measures offspring in stages. Contains the whole algorithm.

There is one parent, at first the closed form. A generation consists of `offspring` neighbours of the parent, each a few
switches away: a switch raises one step's level and lowers another's, and the result is projected exactly onto the
target (Sieberling et al. 2024, EvoPress, §3). Every offspring is measured with repeat 0, the best `survivors` of them
with repeat 1, the best of those with repeat 2, and so on, up to the number of shards. The parent is measured with every
repeat that its offspring get. With one shard this is a plain elitist (1 + λ) strategy.

Repeats use different shards, so the mean reward of a schedule has a standard error. The spread σ of a single
measurement is estimated from all schedules measured more than once (1.48 times the median deviation from their own
means). An offspring replaces the parent only if it has as many measurements and its mean is higher by more than
`caution`·σ·√(2 / measurements).

If the agent is asked for more while rewards of a generation are outstanding, it breeds another generation from the
current parent, so with many evaluators generations overlap. Each generation proceeds to its next stage when all its
rewards have arrived, and after its last stage is compared with the parent of that moment.

After `screened` trials, offspring are no longer taken at random: each is found by climbing from the parent on the mean
of a surrogate of the trials plus a random multiple of its standard deviation (`agents.surrogate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from agents.batch_agent import BatchAgent
from agents.level_swaps import climb, swapped
from agents.protocol import AgentContext, ProblemLike, Proposal
from agents.surrogate import Surrogate, without_outliers

__all__ = ["Evolution", "EvolutionSettings"]

_TRIES = 50  # rounds of breeding to fill a generation; if they yield nothing new, the space counts as exhausted

Floats = NDArray[np.float64]
Levels = NDArray[np.int64]


@dataclass(frozen=True)
class EvolutionSettings:
    """Settings of the evolution.

    The defaults were chosen on four synthetic problems of 37 steps with 4 % noise and 200 evaluations, by how far the
    true cost of the recommendation lies below that of the closed form: 3 % without the surrogate, 9 % with it; 10 %
    without caution, 11 % with the longer climb. The standard error over problems is 1 to 2 %, so only the gain from the
    surrogate is certain. Staged and single measurements could not be told apart.
    """

    offspring: int = 8  # offspring per generation
    survivors: tuple[int, ...] = (2, 1)  # how many of them are measured with repeat 1, repeat 2, and so on
    switches: int = 3  # largest number of level switches between parent and offspring
    reach: int = 2  # largest number of levels by which one switch moves a step
    caution: float = 0.0  # standard errors by which an offspring must be better
    screened: int = 20  # trials after which the surrogate chooses offspring; a number above the budget turns it off
    rounds: int = 25  # rounds of climbing on the surrogate for each offspring
    children: int = 24  # neighbours to choose from in each round
    optimism: float = 1.0  # scale of the random multiple of the surrogate's standard deviation added to its mean
    memory: int = 400  # number of latest trials that the surrogate is fitted to


@dataclass
class _Generation:
    """Offspring that are compared with one another, and the proposals whose rewards they wait for."""

    members: list[Proposal]
    awaited: list[Proposal]
    stage: int = 0


class Evolution(BatchAgent):
    """See the module."""

    name = "evolution"

    def __init__(self, problem: ProblemLike, context: AgentContext, settings: EvolutionSettings | None = None) -> None:
        super().__init__(problem, context)
        self.settings = settings or EvolutionSettings()
        self.parent = Proposal(problem.closed_form(), (problem.middle,) * problem.steps)
        self.surrogate = Surrogate(problem)
        self._generations: list[_Generation] = []

    def recommend(self, count: int) -> list[Proposal]:
        """See `agents.Agent`. Ranks the trials by the reward that the surrogate predicts."""
        levels, rewards = self.trials
        if len(rewards) < 3:
            return self._ledger.best(count)
        for generation in self._generations:
            self._challenge(generation.members)
        self.surrogate.fit(levels, without_outliers(rewards))
        return self._distinct(self._believed(self.surrogate), count)

    def _plan(self) -> None:
        """Plans the next stage of the first generation whose rewards have all arrived, or else a new generation."""
        for generation in list(self._generations):
            if any(map(self._ledger.is_open, generation.awaited)):
                continue
            if self._promote(generation):
                return
            self._challenge(generation.members)
            self._generations.remove(generation)
        self._reproduce()

    def _promote(self, generation: _Generation) -> bool:
        """Enters the next repeat of a generation's best and of the parent; returns False after the last stage."""
        stages = self.settings.survivors[: self._context.shards - 1]
        while generation.members and generation.stage < len(stages):
            ranked = sorted(generation.members, key=lambda proposal: -self.record(proposal).mean)
            generation.members = ranked[: stages[generation.stage]]
            generation.stage += 1
            for proposal in (self.parent, *generation.members):
                self._enter(replace(proposal, repeat=generation.stage))
            if self._planned:
                generation.awaited = list(self._planned)
                return True
        return False

    def _challenge(self, members: Sequence[Proposal]) -> None:
        """Replaces the parent by the best of the members if it is better, see the module."""
        parent = self.record(self.parent)
        for proposal in members:
            record = self.record(proposal)
            shards = min(len(record.rewards), len(parent.rewards))
            margin = self.settings.caution * self._noise() * np.sqrt(2 / max(1, shards))
            if record.rewards and len(record.rewards) >= len(parent.rewards) and record.mean > parent.mean + margin:
                self.parent, parent = proposal, record

    def _noise(self) -> float:
        """Standard deviation of a single measurement; 0 while no schedule was measured twice."""
        apart = [
            np.abs(np.array(record.rewards) - record.mean) * np.sqrt(len(record.rewards) / (len(record.rewards) - 1))
            for record in self.records.values()
            if len(record.rewards) > 1 and np.isfinite(record.mean)
        ]
        return 1.4826 * float(np.median(np.concatenate(apart))) if apart else 0.0

    def _reproduce(self) -> None:
        """Breeds a new generation; offspring proposed before are replaced by others that are further away."""
        members: list[Proposal] = []
        self._enter(self.parent)
        for attempt in range(_TRIES):
            missing = self.settings.offspring - len(members)
            if missing <= 0:
                break
            for levels in self._offspring(missing, attempt):
                proposal = self._proposal(levels)
                if self._enter(proposal):
                    members.append(proposal)
        self._generations.append(_Generation(members, list(self._planned)))

    def _offspring(self, count: int, attempt: int) -> Levels:
        settings = self.settings
        parents = np.tile(np.array(self.parent.actions), (count, 1))
        levels, rewards = self.trials
        if attempt > _TRIES // 2:
            return self._problem.legalise(self._generator.integers(0, self._problem.levels, parents.shape))
        children = swapped(self._problem, parents, settings.switches + attempt, settings.reach, self._generator)
        if attempt or len(rewards) < settings.screened:
            return children
        self.surrogate.fit(levels[-settings.memory :], without_outliers(rewards[-settings.memory :]))
        hope = settings.optimism * np.abs(self._generator.standard_normal(count))

        def value(actions: Levels, origin: Levels) -> Floats:
            mean, deviation = self.surrogate.belief(actions)
            return mean + hope[origin] * deviation

        return climb(
            self._problem,
            parents,
            value,
            settings.rounds,
            settings.children,
            settings.switches,
            settings.reach,
            self._generator,
        )
