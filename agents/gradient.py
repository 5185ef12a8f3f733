"""Gradient: prices follow what a backward pass says that parameters are worth. The whole algorithm, top to bottom.

The closed form is where predicted gains per parameter are equal over all sites. The true KL is stationary on the budget
surface where the measured ones are. Every schedule on the way is a relaxed choice from the menus: a site's mask over
its directions opens a little further, and the slope of the measured KL along that opening is compared with the
predicted one, for all sites from one backward pass. As in learned masks (Xv et al. 2025, ARA) a site may stay dense;
unlike there no mask is trained at a penalty, because the projection keeps the budget.

With θ the log weights of the steps, w = exp(membership·θ) those of the sites, m measured and p predicted gains:

    θ ← θ + ρ_k·clip(log r),    r_t = Σ_{s in t} m_s / (c·Σ_{s in t} w_s p_s),    c = Σ m / Σ w p,

summed over the last iterations with weights that decay, since one set of data is noisy. ρ_k falls like 1 / (1 + k / τ).
Where r = 1 at all steps nothing moves. What is recommended is the mean of θ over the second half of the iterations
(Polyak & Juditsky 1992), the last θ, and the trials of highest reward.

Slopes are of the KL alone, whatever else the reward holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from agents.ledger import Ledger
from agents.protocol import Proposal, Task, Terms

__all__ = ["Gradient", "GradientSettings"]

_TRIES = 30  # moves without another schedule; then it stands still

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class GradientSettings:
    """What can be tuned."""

    rate: float = 0.4  # ρ at the start
    slowing: float = 6.0  # τ, iterations
    memory: float = 0.7  # weight of the gains of an iteration in the next one's sums
    clip: float = 5.0  # largest r, and 1 over the smallest
    reach: float = 2.5  # largest |θ|, in log price


class Gradient:
    """See the module."""

    name = "gradient"

    def __init__(self, task: Task, terms: Terms, settings: GradientSettings | None = None) -> None:
        self.settings = settings or GradientSettings()
        self._task = task
        self._terms = terms
        self._ledger = Ledger(terms)
        self._theta: Floats = np.zeros(task.steps)
        self._passed: list[Floats] = []
        self._gains: Floats = np.zeros((2, len(task.membership)))  # measured, predicted
        self._known: dict[str, list[Floats]] = {}  # the same of every look, by schedule
        self._open: Proposal | None = None

    def ask(self, count: int) -> list[Proposal]:
        """See `agents.Agent`. One at a time: the next one needs the slopes of this one."""
        self._ledger.check(count)
        if self._open is not None:
            return []
        for _ in range(_TRIES if self._ledger.left else 0):
            schedule = self._task.weighted(self._theta)
            probe = self._task.probe(schedule)
            for look in range(self._terms.looks):
                proposal = Proposal(schedule, None, (len(self._passed) + look) % self._terms.looks, probe)
                if proposal.cost > self._ledger.left:
                    proposal = replace(proposal, probe=None)  # what is left does not pay for slopes
                if self._ledger.add(proposal):
                    self._open = proposal
                    return [proposal]
            # θ has moved too little to be another schedule, and all data have been looked at: move on by what is known.
            self._absorb(schedule.digest)
            self._theta = self._moved()
        return []

    def tell_slopes(self, proposal: Proposal, slopes: Mapping[str, float]) -> None:
        """See `agents.SlopeAgent`."""
        assert proposal.probe is not None
        gains = np.stack(self._task.gains(proposal.schedule, proposal.probe, slopes))
        if slopes and np.isfinite(gains).all():
            self._known.setdefault(proposal.schedule.digest, []).append(gains)

    def tell(self, proposals: Sequence[Proposal], rewards: Sequence[float]) -> None:
        """See `agents.Agent`."""
        self._ledger.close(proposals, rewards)
        for proposal in proposals:
            self._open = None
            self._passed.append(self._theta)
            self._absorb(proposal.schedule.digest)
            self._theta = self._moved()

    def recommend(self, count: int) -> list[Proposal]:
        """See `agents.Agent`."""
        if not self._passed:
            return []
        thetas = (self.offsets, self._theta)
        found = {one.digest: Proposal(one, None) for one in map(self._task.weighted, thetas)}
        for proposal in self._ledger.best(count):
            found.setdefault(proposal.schedule.digest, Proposal(proposal.schedule, None))
        return list(found.values())[:count]

    @property
    def offsets(self) -> Floats:
        """Mean of θ over the second half of the iterations, (steps,); 0 before the first."""
        late = [*self._passed, self._theta][(len(self._passed) + 1) // 2 :]
        mean: Floats = np.mean(late, axis=0)
        return mean

    @property
    def settled(self) -> bool:
        """Whether everything proposed is told."""
        return self._open is None

    def _absorb(self, digest: str) -> None:
        if known := self._known.get(digest):
            self._gains = self.settings.memory * self._gains + np.mean(known, axis=0)

    def _moved(self) -> Floats:
        settings, membership = self.settings, self._task.membership
        measured, predicted = self._gains
        expected = membership.T @ (predicted * np.exp(membership @ self._theta))
        total = float(expected.sum())
        gained = membership.T @ measured
        if not total > 0 or not gained.sum() > 0:
            return self._theta
        ratio = gained * total / (np.maximum(expected, 1e-12 * total) * gained.sum())
        ratio = np.where(expected > 1e-9 * total, np.clip(ratio, 1 / settings.clip, settings.clip), 1.0)
        rate = settings.rate / (1 + (len(self._passed) - 1) / settings.slowing)
        theta = self._theta + rate * np.log(ratio)
        moved: Floats = np.clip(theta - theta.mean(), -settings.reach, settings.reach)
        return moved
