"""Predicts the rewards of untried episodes from the trials so far, with a Gaussian process.

Knows actions, forecasts and rewards; does not know schedules or the agent that uses it.
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
    """Gaussian process that predicts the mean and standard deviation of the reward of complete episodes.

    An episode is described by two vectors: x, its offsets minus their mean (adding a constant changes no schedule), and
    f, the forecast cost of every group minus its forecast cost in the closed form. The kernel is

        a + b·Σf·Σf' + θ₁·f·f' + θ₂·exp(−|x − x'|² / 4)

    in units of the trials' own spread, with large a and b. Its four terms stand for a constant, the total predicted
    cost, groups that matter more or less than predicted, and smooth interactions of all steps. θ and the ridge (the
    noise variance) are the grid point of highest marginal likelihood. With more than 256 trials, θ is searched again
    only after the number of trials has grown by an eighth.
    """

    def __init__(self, problem: ProblemLike) -> None:
        """Starts without trials; call `fit` before any prediction."""
        rungs = np.asarray(problem.offsets[:-1], dtype=np.float64)
        self._positions = np.append(rungs, 2 * rungs[-1] - rungs[-2] if len(rungs) > 1 else 1.0)
        self._forecast = problem.forecast
        self._origin = problem.forecast(np.full((1, problem.steps), problem.middle))
        self._theta = 0.3, 0.3
        self._enough = _MANY  # number of trials from which θ is searched again

    def fit(self, actions: Levels, rewards: Floats) -> Floats:
        """Fits the process to trials, (n, steps) and (n,).

        Returns:
            Leave-one-out residuals, (n,): each reward minus its prediction from the other trials.
        """
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
        """Posterior mean and standard deviation of the reward, (n, steps) -> (n,), (n,)."""
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
        """Kernel of each episode with itself, (n,)."""
        f, (_, cost, total) = views[1], self._scales
        diagonal: Floats = 100 + 30 * np.square(f.sum(axis=1)) / total
        diagonal += self._theta[0] * np.square(f).sum(axis=1) / cost + self._theta[1]
        return diagonal


def without_outliers(rewards: Floats) -> Floats:
    """Replaces failures and outliers by the worst of the other rewards, (n,) -> (n,).

    An outlier lies more than ten times as far below the best reward as the median does. Such episodes should be
    avoided, but how bad they are teaches nothing about the others.
    """
    finite = rewards[np.isfinite(rewards)]
    if not len(finite):
        return np.zeros(len(rewards))
    best, median = float(finite.max()), float(np.median(finite))
    ordinary = finite[finite >= best - 10 * max(best - median, 1e-9)]
    lifted: Floats = np.where(np.isfinite(rewards), np.maximum(rewards, ordinary.min()), ordinary.min())
    return lifted
