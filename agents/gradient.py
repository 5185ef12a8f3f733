"""Adjusts the weights of the closed form until measured gains per parameter agree. Contains the whole algorithm.

In the closed form, predicted gains per parameter are equal over all sites. The true KL is stationary at fixed size
where the measured gains per parameter are equal. In every iteration, each site's mask over its singular directions is
opened a little further, and the slope of the measured KL along that opening is compared with the predicted slope; one
backward pass gives the slopes of all sites. As with learned masks (Xv et al. 2025, ARA), a site may stay dense; unlike
there, no mask is trained with a penalty, because the projection keeps the size exact.

Let θ be the log weights of the steps, w = exp(membership·θ + δ) the weights of the sites, m the measured and p the
predicted gains. Then

    θ ← θ + ρ_k·clip(log r),    r_t = Σ_{s in t} m_s / (c·Σ_{s in t} w_s p_s),    c = Σ m / Σ w p,

where sums run over past iterations with decaying weights, since one shard is noisy, and ρ_k ∝ 1 / (1 + k / τ). If r = 1
at all steps, nothing moves.

δ lets single sites deviate from their steps. It is shrunk by how much the iterations disagree: with e_s the mean over
iterations of m_s / (c·exp(membership·θ)_s·p_s) − 1, and n_s its squared standard error,

    δ ← δ + ρ_k·(clip(log(1 + e_s·σ² / (σ² + n_s))) − δ).

The agent recommends the schedule of the mean θ and δ over the second half of the iterations (Polyak & Juditsky 1992),
then that of the last θ and δ, then the trials of highest reward.

Slopes are of the KL alone, whatever other terms the reward has. The agent draws no random numbers: the seed only sets
the `repeat`, and thereby the shard, of the first iteration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from agents.ledger import Ledger
from agents.protocol import AgentContext, ProblemLike, Proposal

__all__ = ["Gradient", "GradientSettings"]

_TRIES = 30  # moves in a row that lead to no new proposal; then the agent has finished

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class GradientSettings:
    """Settings of the iteration."""

    rate: float = 0.4  # ρ at the start
    slowing: float = 6.0  # τ, iterations
    memory: float = 0.7  # factor by which the sums of gains decay per iteration
    clip: float = 5.0  # r is clipped to [1 / clip, clip]
    reach: float = 2.5  # largest |θ|, in log price
    spread: float = 0.5  # σ, the spread of the sites' ratios around the ratio of their step
    patience: float = 0.95  # factor by which an iteration's weight in e_s decays per iteration


class Gradient:
    """See the module."""

    name = "gradient"

    def __init__(self, problem: ProblemLike, context: AgentContext, settings: GradientSettings | None = None) -> None:
        self.settings = settings or GradientSettings()
        self._problem = problem
        self._context = context
        self._ledger = Ledger(context)
        self._theta: Floats = np.zeros(problem.steps)
        self._delta: Floats = np.zeros(len(problem.membership))
        self._passed: list[tuple[Floats, Floats]] = []  # θ and δ of every iteration
        self._gains: Floats = np.zeros((2, len(problem.membership)))  # measured, predicted
        self._history: list[Floats] = []  # the gains of single iterations
        self._known: dict[str, list[Floats]] = {}  # the gains of every evaluation, by the schedule's digest
        self._open: Proposal | None = None

    def ask(self, count: int) -> list[Proposal]:
        """See `agents.Agent`. Makes one proposal at a time, since the next one needs the slopes of this one."""
        self._ledger.check(count)
        if self._open is not None:
            return []
        for _ in range(_TRIES if self._ledger.left else 0):
            schedule = self._problem.weighted(self._theta, self._delta)
            probe = self._problem.probe(schedule)
            for repeat in range(self._context.shards):
                turn = self._context.seed + len(self._passed) + repeat
                proposal = Proposal(schedule, None, turn % self._context.shards, probe)
                if proposal.cost > self._ledger.left:
                    proposal = replace(proposal, probe=None)  # the rest of the budget does not pay for slopes
                if self._ledger.add(proposal):
                    self._open = proposal
                    return [proposal]
            # θ has moved too little to give another schedule, which was measured on all shards: reuse its known gains.
            self._move(schedule.digest)
        return []

    def tell_slopes(self, proposal: Proposal, slopes: Mapping[str, float]) -> None:
        """See `agents.SlopeAgent`."""
        assert proposal.probe is not None
        gains = np.stack(self._problem.gains(proposal.schedule, proposal.probe, slopes))
        if slopes and np.isfinite(gains).all():
            self._known.setdefault(proposal.schedule.digest, []).append(gains)

    def tell(self, proposals: Sequence[Proposal], rewards: Sequence[float]) -> None:
        """See `agents.Agent`."""
        self._ledger.close(proposals, rewards)
        for proposal in proposals:
            self._open = None
            self._passed.append((self._theta, self._delta))
            self._move(proposal.schedule.digest)

    def recommend(self, count: int) -> list[Proposal]:
        """See `agents.Agent`."""
        if not self._passed:
            return []
        prices = ((self.offsets, self.residuals), (self._theta, self._delta))
        found = {one.digest: Proposal(one, None) for one in (self._problem.weighted(*price) for price in prices)}
        for proposal in self._ledger.best(count):
            found.setdefault(proposal.schedule.digest, Proposal(proposal.schedule, None))
        return list(found.values())[:count]

    @property
    def offsets(self) -> Floats:
        """Mean of θ over the second half of the iterations, (steps,); 0 before the first."""
        return self._late(0)

    @property
    def residuals(self) -> Floats:
        """Mean of δ over the second half of the iterations, (sites,); 0 before the first."""
        return self._late(1)

    @property
    def settled(self) -> bool:
        """Whether all proposals have their rewards."""
        return self._open is None

    def _late(self, which: int) -> Floats:
        late = [*self._passed, (self._theta, self._delta)][(len(self._passed) + 1) // 2 :]
        mean: Floats = np.mean([pair[which] for pair in late], axis=0)
        return mean

    def _move(self, digest: str) -> None:
        """Makes one iteration with the known gains of the schedule with this digest, if there are any."""
        if known := self._known.get(digest):
            gains = np.mean(known, axis=0)
            self._gains = self.settings.memory * self._gains + gains
            self._history.append(gains)
        self._theta, self._delta = self._moved(), self._departed()

    @property
    def _rate(self) -> float:
        return self.settings.rate / (1 + (len(self._passed) - 1) / self.settings.slowing)

    def _moved(self) -> Floats:
        """Returns the next θ, (steps,)."""
        settings, membership = self.settings, self._problem.membership
        measured, predicted = self._gains
        expected = membership.T @ (predicted * np.exp(membership @ self._theta + self._delta))
        total = float(expected.sum())
        gained = membership.T @ measured
        if not total > 0 or not gained.sum() > 0:
            return self._theta
        ratio = gained * total / (np.maximum(expected, 1e-12 * total) * gained.sum())
        ratio = np.where(expected > 1e-9 * total, np.clip(ratio, 1 / settings.clip, settings.clip), 1.0)
        theta = self._theta + self._rate * np.log(ratio)
        moved: Floats = np.clip(theta - theta.mean(), -settings.reach, settings.reach)
        return moved

    def _departed(self) -> Floats:
        """Returns the next δ, (sites,); unchanged before the second iteration, since one does not show its noise."""
        settings, count = self.settings, len(self._history)
        if count < 2:
            return self._delta
        measured, predicted = np.stack(self._history, axis=1)
        weights = settings.patience ** np.arange(count)[::-1, None]
        weights /= weights.sum()
        expected = (weights * predicted).sum(axis=0) * np.exp(self._problem.membership @ self._theta)
        total, gained = float(expected.sum()), float((weights * measured).sum())
        if not total > 0 or not gained > 0:
            return self._delta
        expected *= gained / total
        known = expected > 1e-9 * gained
        ratios = np.where(known, measured / np.where(known, expected, 1.0), 1.0)
        mean = (weights * ratios).sum(axis=0)
        # Squared standard error of a weighted mean, its variance estimated with the same weights (Kish's effective
        # sample size).
        share = float((weights**2).sum())
        noise = (weights * (ratios - mean) ** 2).sum(axis=0) * share / (1 - share)
        shrunk = 1 + (mean - 1) * settings.spread**2 / (settings.spread**2 + noise)
        departed: Floats = self._delta + self._rate * (
            np.log(np.clip(shrunk, 1 / settings.clip, settings.clip)) - self._delta
        )
        return departed
