"""The Optuna agent that searches the Pareto front of quality and size with NSGA-II."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.study import StudyDirection

from agents.optuna_agents import Floats, Levels, OptunaAgent, OptunaSettings
from agents.protocol import AgentContext, ProblemLike, Proposal
from agents.surrogate import without_outliers

__all__ = ["OptunaPareto"]

_TARGET = "target_kept"  # NSGA-II's parameter in addition to the steps


class OptunaPareto(OptunaAgent):
    """NSGA-II with two objectives: maximize quality and minimize the kept fraction.

    Quality is the reward without its compression term. The target is an additional parameter, on a grid around the
    problem's own target that does not go below the smallest options. A point consists of the levels and the index of
    the target on the grid. Proposals at another target than the problem's carry no actions and may keep more than the
    problem allows.
    """

    _directions: ClassVar[list[StudyDirection]] = [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]

    def __init__(self, problem: ProblemLike, context: AgentContext, settings: OptunaSettings | None = None) -> None:
        settings = settings or OptunaSettings()
        self._by_target = _problems_around(problem, settings)
        self._own = self._by_target.index(problem)
        super().__init__("optuna-nsga2", problem, context, settings)

    def front(self) -> list[tuple[float, float, Proposal]]:
        """(kept fraction, quality, proposal) of the trials that no other trial dominates, ascending in both numbers."""
        trials = [
            (self._problem.kept(proposal.schedule), self._quality(proposal, reward), proposal)
            for proposal, reward in self._told.values()
            if math.isfinite(reward)
        ]
        front: list[tuple[float, float, Proposal]] = []
        for trial in sorted(trials, key=lambda trial: (trial[0], -trial[1])):
            if not front or trial[1] > front[-1][1]:
                front.append(trial)
        return front

    def _values(self, proposal: Proposal, reward: float) -> list[float]:
        return [self._quality(proposal, reward), self._problem.kept(proposal.schedule)]

    def _make_space(self) -> dict[str, BaseDistribution]:
        return {**super()._make_space(), _TARGET: IntDistribution(0, len(self._by_target) - 1)}

    def _start(self, number: int) -> tuple[int, ...]:
        """Starts with the closed form at the problem's target and at targets spread over the grid, then prior draws."""
        if number <= self.settings.anchors:
            spread = np.linspace(0, len(self._by_target) - 1, self.settings.anchors).round().astype(int).tolist()
            return *super()._start(0), [self._own, *spread][number]
        return *super()._start(number), int(self._generator.integers(len(self._by_target)))

    def _uniform(self) -> tuple[int, ...]:
        return *super()._uniform(), int(self._generator.integers(len(self._by_target)))

    def _taken(self, point: tuple[int, ...]) -> tuple[int, ...]:
        *levels, target = point
        return *self._by_target[target].legalise(levels).tolist(), target

    def _proposal(self, point: tuple[int, ...]) -> Proposal:
        *levels, target = point
        return Proposal(self._by_target[target].schedule(levels), tuple(levels) if target == self._own else None)

    def _evidence(self) -> tuple[Levels, Floats]:
        """All trials projected onto the problem's target: levels (n, steps) and quality (n,).

        The quality of a trial is corrected by the change in its forecast cost times the slope of quality over forecast
        that the trials show.
        """
        told = [(digest, *pair) for digest, pair in self._told.items() if math.isfinite(pair[1])]
        points = [self._points[digest] for digest, _, _ in told]
        quality = np.array([self._quality(proposal, reward) for _, proposal, reward in told])
        there = np.array([self._by_target[point[-1]].forecast(np.array([point[:-1]])).sum() for point in points])
        actions = np.array([self._problem.legalise(point[:-1]) for point in points], dtype=np.int64)
        actions = actions.reshape(-1, self._problem.steps)
        if len(points) < 3:
            return actions, quality
        ordinary, centred = without_outliers(quality), there - there.mean()
        slope = min(0.0, float(ordinary @ centred) / max(float(centred @ centred), 1e-12))
        return actions, quality + slope * (self._problem.forecast(actions).sum(axis=1) - there)


def _problems_around(problem: ProblemLike, settings: OptunaSettings) -> list[ProblemLike]:
    """Returns `problem` and copies of it at other targets, ascending by target."""
    problems = [problem]
    reach = round(settings.around / settings.grid)
    for sign in (-1, 1):
        for place in range(1, reach + 1):
            target = round(problem.target_kept + sign * place * settings.grid, 6)
            try:
                other = problem.at(target)
            except ValueError:  # above 1, or below what the smallest options keep
                break
            problems.insert(0 if sign < 0 else len(problems), other)
    return problems
