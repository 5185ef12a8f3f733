"""Predicts the quality of schedules from slopes and rewards together, with uncertainty.

A truncation removes singular directions of a matrix. Their error is orthogonal to the rest of the matrix's own error in
the metric of the KL, but not to the errors of other sites. With the predicted costs c of the sites, the KL is modelled
around a place, a vector of log weights, as

    KL  =  s · Σ_i ω_i c_i,        ω_i = a·w_i + 2b·I_i + (M u)_i,

where w_i is the cost of site i per predicted cost, I_i its interaction with the errors of all other sites per predicted
cost, and M the membership of sites in steps (blocks and families). The best schedule gives site i the log weight
log ω_i, up to a constant; the critic thus regresses residual log prices.

**Slopes give w and I.** One backward pass measures, for every site, the ratio of its measured to its predicted gain:

    r_i  =  w_i + I_i.

What a site's own error adds to a slope is twice its change, as in the predicted gain; the interaction is counted once.
(For a dense site, `gains` counts it twice.) The priors are w_i ~ N(1, τ²) and, for errors with random directions of
correlation ρ,

    Cov(I_i, I'_i)  =  ρ² · Σ_j min(c_j, c'_j) / slice_i

between two schedules, since they share the smaller error of every site; slice_i is the predicted cost that the probe
restores. This is a Gaussian process per site, in which a pass counts less the further its schedule lies from the
present one. τ and ρ have the highest marginal likelihood on a grid. Passes on one shard see the same data, so their
noise is shared; its size for a site is estimated from the residuals.

**Rewards give a, b and u**, together with an offset for every shard, by Bayesian linear regression. To first order b
is 1. As the schedule moves, it meets other singular directions, whose interactions differ, so that less is gained: b is
expected to be 1/2. For the same reason the critic is to be believed only near the places of its passes. The residuals
of the slopes on a shard correct the prediction of rewards on that shard, so that what is peculiar to a shard is not
taken for an effect of the schedule.

Knows costs, gains and qualities (rewards without the term of the size); does not know schedules or agents.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.protocol import SLOPES_COST, ProblemLike

__all__ = ["CriticSettings", "SlopeCritic"]

_GRID = tuple(itertools.product((0.1, 0.2, 0.4, 0.8), (0.03, 0.06)))  # of τ and ρ
_ERRORS = (0.003, 0.01, 0.03, 0.1)  # grid of the noise of a reward, as a fraction of the mean KL
_MANY = 16  # passes from which the grid is searched again only after their number has grown by an eighth
_LEAST_NOISE = 0.01  # variance of a ratio on the only shard
_UNSEEN = 1e6  # variance of a ratio that was not measured
_OWN_NOISE = 1.0  # variance of the noise of a single pass, over that of its shard

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class CriticSettings:
    """Settings of the critic."""

    noise: float = 0.5  # expected standard deviation of a ratio between shards
    doubt: float = 4.0  # number of residuals that this expectation counts as
    clip: float = 8.0  # largest ratio of measured to predicted gains, over that of all sites, that is believed
    smallest: float = 0.2  # least a·w + 2b·I + u
    own: float = 0.2  # τ before the first pass
    pair: float = 0.06  # ρ before the first pass
    both: float = 0.5  # expected b
    spread: float = 0.1  # prior standard deviation of a and b
    step_spread: float = 0.1  # of u
    memory: int = 60  # number of latest passes in use


@dataclass(frozen=True, eq=False)
class _Pass:
    """Slopes of one evaluation; arrays by site."""

    shard: int
    cost: Floats  # c
    slice: Floats  # predicted cost that the probe restores
    share: Floats  # how often the ratio counts the interaction
    measured: Floats  # gains
    predicted: Floats
    seen: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class _Look:
    cost: Floats
    shard: int
    quality: float


class SlopeCritic:
    """See the module."""

    def __init__(self, problem: ProblemLike, shards: int, settings: CriticSettings | None = None) -> None:
        """Starts with the prior, in which the closed form is best."""
        self.settings = settings or CriticSettings()
        self._problem, self._shards = problem, shards
        self._membership = problem.membership
        self._count, self._steps = self._membership.shape
        self._passes: list[_Pass] = []
        self._looks: list[_Look] = []
        self._theta = self.settings.own, self.settings.pair
        self._searched = 0  # number of passes at the last search of the grid
        self._fit_slopes()
        self.fit(np.zeros(self._count))

    @property
    def passes(self) -> int:
        """Number of passes that gave slopes."""
        return len(self._passes)

    def add_slopes(self, shard: int, cost: Floats, then: Floats, measured: Floats, predicted: Floats) -> None:
        """Adds a pass, with arrays (sites,); ignores it if nothing was measured.

        Args:
            cost: predicted costs of the sites in the schedule, and `then` in its probe.
            measured: measured gains, see `ProblemLike.gains`; NaN where a site was not measured.
            predicted: predicted gains.
        """
        seen = np.isfinite(measured) & (predicted > 1e-9 * predicted.sum())
        if seen.any() and measured[seen].sum() > 0:
            share = np.where(cost > 0, 1.0, 2.0)
            self._passes.append(_Pass(shard, cost, np.abs(cost - then), share, measured, predicted, seen))
            self._fit_slopes()

    def add_quality(self, shard: int, cost: Floats, quality: float) -> None:
        """Adds the quality of a schedule with these predicted costs; one that is not finite is ignored."""
        if np.isfinite(quality):
            self._looks.append(_Look(cost, shard, quality))

    @property
    def known(self) -> int:
        """Number of passes and qualities that it knows."""
        return len(self._passes) + len(self._looks)

    def fit(self, at: Floats) -> None:
        """Fits all to the passes and looks so far, for schedules around the log weights `at`, (sites,)."""
        self._at = self._problem.tradeoff(at)
        here = self._at.cost[0]
        shared = np.array([np.minimum(one.cost, here).sum() for one in self._recent])
        self._interaction = self._pair_variance() * (shared @ self._dual)
        self._parts = np.column_stack([self._own, 2 * self._interaction, self._membership])
        self._fit_rewards()
        self._marginal = np.maximum(self._parts @ self._belief, self.settings.smallest)

    def __call__(self, places: Floats) -> Floats:
        """Predicted quality, the negative KL, at log weights (n, sites) -> (n,)."""
        return self.quality(self._problem.tradeoff(places).cost)

    def quality(self, costs: Floats) -> Floats:
        """Predicted quality of schedules with these predicted costs of the sites, (n, sites) -> (n,)."""
        predicted: Floats = -self._scale * (costs @ self._marginal)
        return predicted

    def gradient(self, places: Floats) -> tuple[Floats, Floats]:
        """Derivative of the prediction by the log weights, and its curvature by each of them, (n, sites) each."""
        found = self._problem.tradeoff(places)
        return -self._scale * found.gradient(self._marginal), self._scale * found.rise * self._marginal

    @property
    def log_weights(self) -> Floats:
        """The log weights that the critic believes best around the place of the fit, (sites,), up to a constant."""
        found: Floats = np.log(self._marginal)
        return found

    @property
    def covariance(self) -> Floats:
        """Posterior covariance of the best log weights around the place of the fit, (sites, sites)."""
        spread = np.diag(self._variances()[0]) + self._membership @ self._doubts[2:, 2:] @ self._membership.T
        found: Floats = spread / np.outer(self._marginal, self._marginal)
        return found

    def worth_of_slopes(self) -> tuple[float, list[int]]:
        """What a pass at the place of the fit is worth, and the shards to make it on, best first.

        The worth is the expected fall, per evaluation, of the regret ½·Σ h_i·Var(log ω_i), in nats per token, where
        ω_i is the marginal cost of site i and h_i the curvature of the KL by its log weight.
        """
        known = sorted({one.shard for one in self._recent})
        fresh = [shard for shard in range(self._shards) if shard not in known]
        worth = {shard: self._regret(self._variances(shard)[1]) for shard in (*fresh[:1], *known)}
        order = sorted(worth, key=lambda shard: -worth[shard])
        return worth[order[0]] / SLOPES_COST, [*order[:1], *fresh[1:], *order[1:]]

    def worth_of_looks(self, costs: Floats) -> float:
        """What pairs of looks are worth on average, per evaluation.

        Args:
            costs: predicted costs of the sites; neighbouring rows, (2n, sites), are a pair.
        """
        features = costs @ self._parts
        change = features[::2] - features[1::2]
        moved = change @ self._doubts
        power = np.maximum((moved * change).sum(axis=1) + 2 * self._error**2, 1e-300)
        fall = np.square(moved @ self._parts.T) / power[:, None]
        return float(np.mean([self._regret(one) for one in fall])) / 2

    def _regret(self, variance: Floats) -> float:
        """½·Σ h_i·Var(log ω_i) for variances of ω, (sites,)."""
        return 0.5 * self._scale * float((self._at.rise[0] / self._marginal) @ variance)

    # Slopes.

    @property
    def _recent(self) -> list[_Pass]:
        return self._passes[-self.settings.memory :]

    def _pair_variance(self, theta: tuple[float, float] | None = None) -> Floats:
        """Variance of I per unit of the error that two schedules share, ρ² / slice, (sites,)."""
        found: Floats = (theta or self._theta)[1] ** 2 / self._slice
        return found

    def _fit_slopes(self) -> None:
        """Finds w, the dual weights of I, the noise of every site, and what is peculiar to a shard."""
        settings, passes = self.settings, self._recent
        self._scale, self._own, self._dual = 1.0, np.ones(self._count), np.zeros((len(passes), self._count))
        self._noise = np.full(self._count, self._usual_noise)
        self._slice = np.full(self._count, 1e-3)
        self._peculiar: dict[int, Floats] = {}
        if not passes:
            return
        seen = np.stack([one.seen for one in passes])
        slices = np.where(seen, np.stack([one.slice for one in passes]), 0.0)
        typical = slices.sum() / seen.sum()
        self._slice = np.where(seen.any(axis=0), slices.sum(axis=0) / np.maximum(seen.sum(axis=0), 1), typical)
        self._slice = np.maximum(self._slice, 1e-3 * typical)
        measured, predicted = (
            np.where(seen, np.stack([getattr(one, name) for one in passes]), 0.0) for name in ("measured", "predicted")
        )
        shards = np.array([one.shard for one in passes])
        expected = np.ones_like(measured)
        for _ in range(2):  # the scale of a pass and the noise need the expected ratios
            usual = np.maximum((predicted * expected).sum(axis=1), 1e-3 * predicted.sum(axis=1))
            scales = (measured.sum(axis=1) / usual)[:, None]
            ratios = np.divide(measured, scales * predicted, out=np.ones_like(measured), where=seen)
            left = np.clip(ratios, -settings.clip, settings.clip).T - 1
            if self._searched + max(1, self._searched // 8 if self._searched >= _MANY else 0) <= len(self._passes):
                self._theta = max(_GRID, key=lambda theta: self._solve(theta, left)[0])
            _, dual = self._solve(self._theta, left)
            signal = self._kernel(self._theta)
            expected = 1 + (signal @ dual[:, :, None])[:, :, 0].T
            self._noise = self._residual_noise(np.where(seen, 1 + left.T - expected, 0.0), shards)
        self._searched = len(self._passes) if self._searched < _MANY or len(self._passes) > self._searched else 0
        self._own = 1 + self._theta[0] ** 2 * dual.sum(axis=1)
        self._dual = np.stack([one.share for one in passes]) * dual.T
        self._scale = float(np.exp(np.log(scales).mean()))
        for shard in np.unique(shards):
            rows = np.where(seen, 1 + left.T - expected, 0.0)[shards == shard]
            self._peculiar[int(shard)] = rows.mean(axis=0)

    @property
    def _usual_noise(self) -> float:
        """Expected variance of a ratio on one shard around its mean over all shards, which is what rewards measure."""
        return self.settings.noise**2 * (1 - 1 / self._shards) + _LEAST_NOISE

    def _residual_noise(self, left: Floats, shards: NDArray[np.int64]) -> Floats:
        """Variance of the ratios of every site between shards, shrunk towards that of all sites."""
        means = np.stack([left[shards == shard].mean(axis=0) for shard in np.unique(shards)])
        square = np.square(means - means.mean(axis=0)).sum(axis=0)
        free, doubt = len(means) - 1, self.settings.doubt
        pooled = (doubt * self._usual_noise + float(square.mean())) / (doubt + free)
        noise: Floats = (doubt * pooled + square) / (doubt + free)
        return noise

    def _kernel(self, theta: tuple[float, float]) -> Floats:
        """Prior covariance of the ratios of each site in all passes, (sites, passes, passes)."""
        cost, share = (np.stack([getattr(one, name) for one in self._recent]) for name in ("cost", "share"))
        shared = np.stack([np.minimum(cost, one).sum(axis=1) for one in cost])
        pairs = self._pair_variance(theta)[:, None, None] * shared * share.T[:, :, None] * share.T[:, None, :]
        kernel: Floats = theta[0] ** 2 + pairs
        return kernel

    def _noises(self) -> Floats:
        """Covariance of the noise of the ratios, (sites, passes, passes)."""
        shards = np.array([one.shard for one in self._recent])
        one_each = np.eye(len(shards))
        unseen = np.stack([np.where(one.seen, 0.0, _UNSEEN) for one in self._recent], axis=1)
        same = (shards[:, None] == shards) + _OWN_NOISE * one_each
        noises: Floats = self._noise[:, None, None] * same + unseen[:, :, None] * one_each
        return noises

    def _solve(self, theta: tuple[float, float], left: Floats) -> tuple[float, Floats]:
        """Log marginal likelihood of the ratios − 1, (sites, passes), and their dual weights, (sites, passes)."""
        root = np.linalg.cholesky(self._kernel(theta) + self._noises())
        white = np.linalg.solve(root, left[:, :, None])
        determinant = np.log(np.diagonal(root, axis1=1, axis2=2)).sum()
        dual = np.linalg.solve(root.transpose(0, 2, 1), white)[:, :, 0]
        return -0.5 * float(np.square(white).sum()) - float(determinant), dual

    def _variances(self, shard: int = -1) -> tuple[Floats, Floats]:
        """Posterior variance of ω around the place of the fit, and its fall by a pass there on a shard, (sites,)."""
        own, here = self._theta[0] ** 2, self._at.cost[0]
        pair = self._pair_variance() * here.sum()
        counted = 2 * self._belief[1]  # how often ω counts the interaction
        target, both = own + counted**2 * pair, own + counted * pair
        ratio = own + pair + (1 + _OWN_NOISE) * self._noise
        if self._recent:
            shared = np.stack([np.minimum(one.cost, here).sum() * one.share for one in self._recent])
            pairs = self._pair_variance() * shared
            same = np.array([float(one.shard == shard) for one in self._recent])[:, None] * self._noise
            known = np.stack([own + counted * pairs, own + pairs + same]).transpose(2, 1, 0)
            kernel = self._kernel(self._theta) + self._noises()
            explained = known.transpose(0, 2, 1) @ np.linalg.solve(kernel, known)
            target, both, ratio = target - explained[:, 0, 0], both - explained[:, 0, 1], ratio - explained[:, 1, 1]
        return np.maximum(target, 0.0), both**2 / np.maximum(ratio, 1e-9)

    # Rewards.

    def _fit_rewards(self) -> None:
        """Finds the posterior of a, b and u: their means `_belief`, covariance `_doubts`, and a reward's `_error`."""
        settings = self.settings
        self._belief = np.concatenate([[1.0, settings.both], np.zeros(self._steps)])
        deviations = np.concatenate([[settings.spread] * 2, np.full(self._steps, settings.step_spread)])
        self._doubts, self._error = np.diag(deviations**2), _ERRORS[1] * float(self._at.cost.sum())
        looks = _ordinary(self._looks)
        if len(looks) < 2:
            return
        cost = np.stack([look.cost for look in looks])
        shards = np.array([look.shard for look in looks])
        kl = np.array([-look.quality for look in looks]) / self._scale
        none = np.zeros(self._count)
        peculiar = np.stack([self._peculiar.get(int(shard), none) for shard in shards])
        features = cost @ self._parts
        left = kl - features @ self._belief - (cost * peculiar).sum(axis=1)
        offsets = (shards[:, None] == np.unique(shards)).astype(np.float64)
        spread = np.concatenate([deviations, np.full(offsets.shape[1], float(np.abs(left).max()) + 1e-12)])
        best = -np.inf
        for error in np.array(_ERRORS) * (float(np.abs(kl).mean()) + 1e-12):
            white = np.column_stack([features, offsets]) * spread / error
            root = np.linalg.cholesky(white.T @ white + np.eye(len(spread)))
            fitted = np.linalg.solve(root, white.T @ (left / error))
            likelihood = 0.5 * float(np.square(fitted).sum() - np.square(left / error).sum())
            likelihood -= float(np.log(np.diag(root)).sum()) + len(left) * float(np.log(error))
            if likelihood > best:
                best, self._error = likelihood, float(error)
                inverse = np.linalg.inv(root) * spread
                moved, covariance = inverse.T @ fitted, inverse.T @ inverse
        self._belief += moved[: len(deviations)]
        self._doubts = covariance[: len(deviations), : len(deviations)]


def _ordinary(looks: Sequence[_Look]) -> list[_Look]:
    """The looks that are not outliers: those at most ten times as far below the best as the median is."""
    if not looks:
        return []
    qualities = np.array([look.quality for look in looks])
    best = float(qualities.max())
    lowest = best - 10 * max(best - float(np.median(qualities)), 1e-9)
    return [look for look in looks if look.quality >= lowest]
