"""Surrogate: what the trials so far say about episodes that were not tried.

Knows actions, forecasts and rewards; neither schedules nor who asks.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from agents.protocol import ProblemLike

__all__ = ["Surrogate", "without_outliers"]

_MANY = 256

Floats = NDArray[np.float64]
Levels = NDArray[np.int64]


class Surrogate:
    """Mean and standard deviation of the reward of complete episodes, a Gaussian process on the trials so far.

    Two views of an episode: x, its offsets less their mean (a constant changes no schedule), and f, the forecast of
    what every group will cost less that of the closed form. The kernel is

        a + b·Σf·Σf' + θ₁·f·f' + θ₂·exp(−|x − x'|² / 4)

    in units of the trials' own spread, with a and b large: a level, the predicted cost as it stands, groups that matter
    more or less than predicted, and smooth interactions of everything. θ and the ridge have the highest marginal
    likelihood on a grid; with many trials θ is looked for again only when an eighth more are there than the last time.
    """

    def __init__(self, problem: ProblemLike) -> None:
        """No trial yet; call `fit` before anything else."""
        rungs = np.asarray(problem.offsets[:-1], dtype=np.float64)
        self._positions = np.append(rungs, 2 * rungs[-1] - rungs[-2] if len(rungs) > 1 else 1.0)
        self._forecast = problem.forecast
        self._origin = problem.forecast(np.full((1, problem.steps), problem.middle))
        self._theta = 0.3, 0.3
        self._enough = _MANY  # trials from which on θ is looked for

    def fit(self, actions: Levels, rewards: Floats) -> Floats:
        """Learn (n, steps) -> (n,). Returns each trial's reward less what the other trials predict for it, (n,)."""
        x, f = self._views(actions)
        self._scales = (
            max(float(np.square(x).sum(axis=1).mean()), 1e-12),
            max(float(f.var(axis=0).sum()), 1e-24),
            max(float(f.sum(axis=1).var()), 1e-24),
        )
        self._trials = x, f
        self._centre, self._spread = float(rewards.mean()), float(rewards.std()) + 1e-12
        target = (rewards - self._centre) / self._spread
        best = -np.inf
        residuals = np.zeros(len(rewards))
        thetas = list(itertools.product((0.03, 0.3, 3.0), (0.03, 0.3, 3.0)))
        if len(rewards) >= self._enough:
            self._enough = len(rewards) + len(rewards) // 8
        elif len(rewards) > _MANY:
            thetas = [self._theta]
        for theta in thetas:
            values, vectors = np.linalg.eigh(self._kernel((x, f), theta))
            projected = vectors.T @ target
            for ridge in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
                inverse = 1 / (np.maximum(values, 0.0) + ridge)
                likelihood = 0.5 * float(np.log(inverse).sum() - (inverse * projected**2).sum())
                if likelihood > best:
                    best, self._theta = likelihood, theta
                    self._inverse = vectors * np.sqrt(inverse)
                    self._dual = vectors @ (inverse * projected)
                    residuals = self._spread * self._dual / (vectors**2 @ inverse)
        return residuals

    def __call__(self, actions: Levels) -> Floats:
        """Predicted reward, (n, steps) -> (n,)."""
        return self._mean(self._kernel(self._views(actions), self._theta))

    def belief(self, actions: Levels) -> tuple[Floats, Floats]:
        """Predicted reward, and the standard deviation of what the trials leave open, (n, steps) -> (n,), (n,)."""
        views = self._views(actions)
        kernel = self._kernel(views, self._theta)
        explained = np.square(kernel @ self._inverse).sum(axis=1)
        left = np.maximum(self._kernel_of_itself(views) - explained, 0.0)
        return self._mean(kernel), self._spread * np.sqrt(left)

    def _mean(self, kernel: Floats) -> Floats:
        predicted: Floats = self._centre + self._spread * (kernel @ self._dual)
        return predicted

    def _views(self, actions: Levels) -> tuple[Floats, Floats]:
        x = self._positions[actions]
        return x - x.mean(axis=1, keepdims=True), self._forecast(actions) - self._origin

    def _kernel(self, views: tuple[Floats, Floats], theta: tuple[float, float]) -> Floats:
        (x, f), (y, g), (offset, cost, total) = views, self._trials, self._scales
        distance = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * x @ y.T
        kernel: Floats = 100 + 30 * np.outer(f.sum(axis=1), g.sum(axis=1)) / total
        kernel += theta[0] * (f @ g.T) / cost + theta[1] * np.exp(-distance / (4 * offset))
        return kernel

    def _kernel_of_itself(self, views: tuple[Floats, Floats]) -> Floats:
        """Diagonal of the kernel between episodes and themselves, (n,)."""
        f, (_, cost, total) = views[1], self._scales
        diagonal: Floats = 100 + 30 * np.square(f.sum(axis=1)) / total
        diagonal += self._theta[0] * np.square(f).sum(axis=1) / cost + self._theta[1]
        return diagonal


def without_outliers(rewards: Floats) -> Floats:
    """Failures, and what lies ten times as far below the best as the median, count as the worst of the others.

    They are to be avoided, but how deep they lie teaches nothing about the rest.
    """
    finite = rewards[np.isfinite(rewards)]
    if not len(finite):
        return np.zeros(len(rewards))
    best, median = float(finite.max()), float(np.median(finite))
    ordinary = finite[finite >= best - 10 * max(best - median, 1e-9)]
    lifted: Floats = np.where(np.isfinite(rewards), np.maximum(rewards, ordinary.min()), ordinary.min())
    return lifted
