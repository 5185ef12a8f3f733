"""Defines the decision problem of a bond-dimension search, without a model and without a reward.

Uses NumPy only. Knows the menu, the target and the grouping of sites into steps; turns actions into schedules that meet
the target exactly, and partial episodes into observations. Does not know the scores of schedules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from compression.allocation.closed_form import lagrangian, to_schedule, uniform
from compression.allocation.knapsack import knapsack
from compression.allocation.menu import Menu
from compression.allocation.price_table import Frontier, Tradeoff
from compression.refusal import Refusal
from compression.schedule import Schedule
from envs.groups import Group, group_sites

__all__ = ["LEVELS", "OBSERVATION", "REACH", "Problem"]

LEVELS = 16  # number of rungs of the ladder, plus one for dense
REACH = 1.4  # offset of the highest rung, in log price
_PROBE = 0.08  # step of `Problem.probe`, as a fraction of a site's dense parameters

#: Entries of an observation, in order: (meaning, least, most). The docstring of `BondDimensionEnv` lists them too.
OBSERVATION: tuple[tuple[str, float, float], ...] = (
    ("steps taken so far, as a fraction of all steps", 0.0, 1.0),
    ("whether the group is a family (1) or lies inside one block (0)", 0.0, 1.0),
    ("mean depth of the group's sites, where the first block has 0 and the last block 1", 0.0, 1.0),
    ("parameters of the group, as a fraction of the parameters of all sites", 0.0, 1.0),
    ("predicted cost of the group in the closed form, as a fraction of that of all groups of its kind", 0.0, 1.0),
    ("parameters the group keeps in the closed form, as a fraction of its dense parameters", 0.0, 1.0),
    ("increase of that fraction from the lowest rung to the highest", 0.0, 1.0),
    ("free budget left after the groups forced dense, as a fraction of the free budget at the start", 0.0, 1.0),
    ("offset of the previous step, as a fraction of the highest; 1 if dense, 0 at the first step", -1.0, 1.0),
    ("mean of that fraction over the steps so far", -1.0, 1.0),
    ("steps forced dense so far, as a fraction of all steps", 0.0, 1.0),
    ("whether dense is a legal level now", 0.0, 1.0),
)


@dataclass(frozen=True, eq=False)
class Problem:
    """Defines the steps, the levels and the exact projection onto the target.

    Every level l except the last multiplies the predicted costs of the step's sites by exp(offsets[l]). The middle
    level has offset 0, so choosing it in every step gives the closed-form allocation. The last level keeps every site
    of the step dense. If a site belongs to several groups, their offsets add up. Adding the same constant to the
    offsets of all sites does not change the schedule.

    Attributes:
        menu: options of every site.
        target_kept: parameters after / before over the sites of the menu, in (0, 1]; bytes in a menu by bytes, here and
            in all that follows.
        target_parameters: largest number of parameters that a schedule may keep.
        groups: sites that each step decides about, in order.
        offsets: (levels,), ascending, symmetric around 0, the last one +inf for dense.
        frontier: tables of the parameters and costs of every site over the price.
        base: log weights of the sites' costs at offset 0, (sites,); zero unless set by `around` or `centred`.
    """

    menu: Menu
    target_kept: float
    target_parameters: int
    groups: tuple[Group, ...]
    offsets: NDArray[np.float64]
    frontier: Frontier
    base: NDArray[np.float64]

    @classmethod
    def build(
        cls, menu: Menu, target_kept: float, granularity: str = "block", levels: int = LEVELS, reach: float = REACH
    ) -> Problem:
        """Returns a problem that groups the sites of `menu` and spaces the rungs evenly.

        Args:
            target_kept: parameters after / before over the sites of the menu, 0 < target_kept ≤ 1.
            granularity: "block", "family", "site", "block+family" (a step per block, then a step per family), or "head"
                (see `envs.groups.group_sites`).
            levels: number of levels of a step: an odd number of at least 3 rungs, plus one for dense.
            reach: offset of the highest rung, in log price, 0 < reach < 3.

        Raises:
            ValueError: a value is outside its range, the smallest options already exceed the target, no site has an
                option besides dense, or there are no heads to group.
        """
        if all(len(site.choices) == 1 for site in menu.sites):
            raise Refusal("the menu has no site with an option besides dense")
        target = _target(menu, target_kept)
        if levels < 4 or levels % 2:
            raise Refusal(
                f"levels must be even and at least 4 (an odd ladder and dense), got {levels}; "
                f"nearest: {max(4, levels + levels % 2)}"
            )
        if not 0 < reach < 3:
            raise Refusal(f"reach must lie in (0, 3), got {reach}")
        rungs = np.linspace(-reach, reach, levels - 1)
        rungs[levels // 2 - 1] = 0.0
        return cls(
            menu=menu,
            target_kept=target_kept,
            target_parameters=target,
            groups=group_sites(menu, granularity),
            offsets=np.append(rungs, np.inf),
            frontier=Frontier.build(menu, target),
            base=np.zeros(len(menu.sites)),
        )

    @property
    def steps(self) -> int:
        """Number of actions in one episode, which is the number of groups."""
        return len(self.groups)

    @property
    def levels(self) -> int:
        """Number of levels of a step, including dense."""
        return len(self.offsets)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the groups."""
        return tuple(group.name for group in self.groups)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the rows of the menu: units of sites that a bond joins, and single sites."""
        return tuple(row.site.name for row in self.menu.sites)

    @property
    def middle(self) -> int:
        """The level with offset 0."""
        return self.levels // 2 - 1

    @property
    def dense_level(self) -> int:
        """The last level, which keeps the group dense."""
        return self.levels - 1

    def at(self, target_kept: float) -> Problem:
        """Returns the problem with another target and the same groups and ladder. Raises ValueError as `build` does."""
        target = _target(self.menu, target_kept)
        frontier = Frontier.build(self.menu, target)
        return replace(self, target_kept=target_kept, target_parameters=target, frontier=frontier)

    def around(self, offsets: NDArray[np.float64], residuals: NDArray[np.float64] | None = None) -> Problem:
        """Returns the problem whose closed form is `weighted(offsets, residuals)`; raises ValueError as that does."""
        return replace(self, base=self._log_weights(offsets, residuals))

    def centred(self, log_weights: NDArray[np.float64]) -> Problem:
        """Returns the problem whose closed form multiplies the costs of the sites by exp(log_weights), (sites,).

        Raises:
            ValueError: `log_weights` is not one finite number per site.
        """
        weights = np.asarray(log_weights, dtype=np.float64)
        if weights.shape != self.base.shape or not np.isfinite(weights).all():
            raise Refusal(f"log weights must be {len(self.base)} finite numbers, got shape {weights.shape}")
        return replace(self, base=self.base + weights)

    def kept(self, schedule: Schedule) -> float:
        """Returns the kept fraction of a schedule, all of whose choices must be options of the menu."""
        return self.menu.parameters(self._indices(schedule)) / self.menu.dense_parameters

    def closed_form(self) -> Schedule:
        """Returns the schedule of all-middle actions: the Lagrangian allocation with the log weights `base`."""
        return self.schedule((self.middle,) * self.steps)

    def knapsack(self) -> Schedule:
        """Returns the schedule of least predicted cost that meets the target; see `compression.allocation.knapsack`."""
        return to_schedule(self.menu, knapsack(self.menu, self.target_parameters).indices)

    def uniform(self) -> Schedule:
        """Returns the schedule with the same kept fraction at every site."""
        return to_schedule(self.menu, uniform(self.menu, self.target_parameters))

    def schedule(self, actions: Sequence[int]) -> Schedule:
        """Project actions, one level per step, onto the target: the schedule keeps at most the target, and at least the
        target minus one step of χ.

        Raises:
            ValueError: there is not one level per step, a level is out of range, or the target is too small for the
                groups chosen dense.
        """
        levels = self._levels(actions)
        if levels.shape != (self.steps,):
            raise Refusal(f"a schedule needs {self.steps} actions, one per group, got {levels.shape[-1]}")
        if not self._fits(dense := self._dense_sites(levels)):
            raise Refusal(f"these dense groups leave no room for the target {self.target_kept}; see Problem.mask")
        weights = self.base + self.membership @ np.where(
            levels == self.dense_level, 0.0, self.offsets[np.minimum(levels, self.levels - 2)]
        )
        return to_schedule(
            self.menu, lagrangian(self.menu, self.target_parameters, weights, frozenset(np.flatnonzero(dense).tolist()))
        )

    def weighted(self, offsets: NDArray[np.float64], residuals: NDArray[np.float64] | None = None) -> Schedule:
        """Project offsets (steps,), which need not be rungs, onto the target. No group is forced dense.

        Args:
            residuals: (sites,), added to the log weights of single sites.

        Raises:
            ValueError: there is not one finite offset per step, or not one finite residual per site.
        """
        weights = self._log_weights(offsets, residuals)
        return to_schedule(self.menu, lagrangian(self.menu, self.target_parameters, weights))

    def probe(self, schedule: Schedule) -> Schedule:
        """Returns a schedule in which each site is larger by about 8 % of its dense parameters, but not dense.

        Sites that are dense in `schedule` are smaller by as much.
        """
        near = []
        for site, now in zip(self.menu.sites, self._indices(schedule), strict=True):
            step = _PROBE * site.parameters[-1]
            if site.choices[now].is_dense:
                index = int(np.searchsorted(site.parameters, site.parameters[now] - step))
            else:
                index = int(np.searchsorted(site.parameters, site.parameters[now] + step))
                index = max(now, min(index, len(site.choices) - 2))
            near.append(index)
        return to_schedule(self.menu, np.array(near, dtype=np.int64))

    def gains(
        self, schedule: Schedule, probe: Schedule, slopes: Mapping[str, float]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Returns the measured and the predicted gain of the step from `schedule` to `probe` at each site, (sites,).

        Gains are in nats per token, to first order. If the step adds parameters, the measured gain is −slope and the
        predicted gain is twice the decrease in cost: the cost is quadratic in the error, so its first-order change is
        twice its actual change. A dense site has no error of its own, hence no predicted slope. For it the gain is that
        of staying dense: predicted as twice the increase in cost, and measured as that plus twice the measured slope,
        which contains the interaction with the errors of the other sites.

        Args:
            slopes: first-order change of the KL by site; a missing site counts as 0.
        """
        measured, predicted = np.zeros(len(self.menu.sites)), np.zeros(len(self.menu.sites))
        pairs = zip(self._indices(schedule), self._indices(probe), strict=True)
        for number, (site, (now, then)) in enumerate(zip(self.menu.sites, pairs, strict=True)):
            predicted[number] = 2 * abs(float(site.cost[now] - site.cost[then]))
            slope = slopes.get(site.site.name, 0.0)
            measured[number] = predicted[number] + 2 * slope if site.choices[now].is_dense else -slope
        return measured, predicted

    def mask(self, prefix: Sequence[int] | NDArray[np.int64]) -> NDArray[np.bool_]:
        """Returns which levels are legal at the step after `prefix`, (steps taken,) -> (levels,).

        Leading axes are kept. Only dense can be illegal, namely if the groups already dense, this group, and the
        smallest options of all other sites together exceed the target.
        """
        levels = self._levels(prefix)
        *many, step = levels.shape
        legal = np.ones((*many, self.levels), dtype=np.bool_)
        if step < self.steps:
            legal[..., -1] = self._fits(self._dense_sites(levels) | (self.membership[:, step] > 0))
        return legal

    def legalise(self, actions: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the actions with every illegal dense replaced by the highest rung, (…, steps taken).

        Steps are handled in order: replacing a dense leaves room for a later step to be dense.
        """
        legal = self._levels(actions).copy()
        if not legal.size:
            return legal
        rows = legal.reshape(-1, legal.shape[-1])
        # If the last step may be dense in addition to all dense steps before it, these are all legal.
        doubtful = ~self.mask(rows[:, :-1])[:, -1]
        for row, step in np.argwhere((rows == self.dense_level) & doubtful[:, None]):
            rows[row, step] -= not self.mask(rows[row, :step])[-1]
        return legal

    def observation(self, prefix: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Returns the observation at the step after `prefix`, (steps taken,) -> (entries,), see `OBSERVATION`.

        Leading axes are kept. The entries about the group are 0 after the last step.
        """
        levels = self._levels(prefix)
        *many, step = levels.shape
        seen = np.zeros((*many, len(OBSERVATION)))
        taken = np.clip(self.offsets[levels] / self.offsets[-2], -1.0, 1.0)
        dense = self._dense_sites(levels)
        room = self.target_parameters - self.menu.smallest_parameters
        seen[..., 0] = step / self.steps
        if step < self.steps:
            seen[..., 1:7] = self._group_features[step]
            seen[..., 11] = self._fits(dense | (self.membership[:, step] > 0))
        if room:
            seen[..., 7] = (room - dense @ (self._largest - self._smallest)) / room
        if step:
            seen[..., 8] = taken[..., -1]
            seen[..., 9] = taken.mean(axis=-1)
        seen[..., 10] = (levels == self.dense_level).sum(axis=-1) / self.steps
        return np.clip(seen, -1.0, 1.0).astype(np.float32)

    def share(self, step: int, level: int) -> float:
        """Returns the fraction of its parameters that the step's group keeps at a level, at the closed-form price.

        The fraction lies in [0, 1], never decreases with the level, and is 1 for dense. The later projection changes
        the price by the same factor for all groups.
        """
        sites = np.array(self.groups[step].sites)
        if level == self.dense_level:
            return 1.0
        offsets = self.offsets[level] + self.base[sites]
        return self.frontier.kept(sites, offsets) / float(self._largest[sites].sum())

    def forecast(self, actions: NDArray[np.int64]) -> NDArray[np.float64]:
        """Predict the KL of every group, (n, steps) in nats per token, for n complete episodes of actions (n, steps).

        As `forecast_sites`, whose costs it adds up.
        """
        return self.forecast_sites(actions) @ self.membership

    def forecast_sites(self, actions: NDArray[np.int64]) -> NDArray[np.float64]:
        """Predict the KL of every site, (n, sites) in nats per token, for n complete episodes of actions (n, steps).

        Uses the tables of the frontier without building a schedule, so it is cheap enough for lookahead. It agrees with
        the costs of `schedule(actions)` up to the width of a table cell and one step of χ.
        """
        levels = np.atleast_2d(np.asarray(actions, dtype=np.int64))
        dense = levels == self.dense_level
        weights = np.where(dense, 0.0, self.offsets[np.minimum(levels, self.levels - 2)]) @ self.membership.T
        return self.frontier.costs(self.base + weights, (dense @ self.membership.T) > 0)

    def costs(self, schedule: Schedule) -> NDArray[np.float64]:
        """Returns the predicted cost of every site in a schedule, (sites,), nats per token."""
        pairs = zip(self.menu.sites, self._indices(schedule), strict=True)
        return np.array([site.cost[index] for site, index in pairs], dtype=np.float64)

    def tradeoff(self, log_weights: NDArray[np.float64]) -> Tradeoff:
        """Predict the cost of every site for n allocations with these log weights, (n, sites), and its derivatives.

        As `forecast`, it uses the tables of the frontier, here smoothed. The log weights are added to `base`; no site
        is forced dense.
        """
        return self.frontier.tradeoff(self.base + np.atleast_2d(log_weights))

    @cached_property
    def membership(self) -> NDArray[np.float64]:
        """Membership matrix, (sites, steps): 1 where a site belongs to the group of a step, else 0."""
        matrix = np.zeros((len(self.menu.sites), self.steps))
        for step, group in enumerate(self.groups):
            matrix[list(group.sites), step] = 1.0
        return matrix

    @cached_property
    def _largest(self) -> NDArray[np.int64]:
        return np.array([site.parameters[-1] for site in self.menu.sites], dtype=np.int64)

    @cached_property
    def _smallest(self) -> NDArray[np.int64]:
        return np.array([site.parameters[0] for site in self.menu.sites], dtype=np.int64)

    @cached_property
    def _group_features(self) -> NDArray[np.float64]:
        cost = self.forecast(np.full(self.steps, self.middle))[0]
        family = np.array([group.name.startswith("family_") for group in self.groups])
        depth = np.array([site.site.block for site in self.menu.sites]) / max(
            1, max(s.site.block for s in self.menu.sites)
        )
        rows = []
        for step, group in enumerate(self.groups):
            kind = cost[family == family[step]].sum()
            rows.append(
                (
                    family[step],
                    depth[list(group.sites)].mean(),
                    self._largest[list(group.sites)].sum() / self.menu.dense_parameters,
                    cost[step] / kind if kind else 0.0,
                    self.share(step, self.middle),
                    self.share(step, self.levels - 2) - self.share(step, 0),
                )
            )
        return np.array(rows, dtype=np.float64)

    def _log_weights(self, offsets: NDArray[np.float64], residuals: NDArray[np.float64] | None) -> NDArray[np.float64]:
        weights = self.base + self.membership @ _finite("offsets", offsets, self.steps)
        return weights if residuals is None else weights + _finite("residuals", residuals, len(self.menu.sites))

    def _indices(self, schedule: Schedule) -> NDArray[np.int64]:
        """Option of every site."""
        return np.array([site.index(schedule) for site in self.menu.sites], dtype=np.int64)

    def _levels(self, actions: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        levels = np.asarray(actions, dtype=np.int64)
        if levels.ndim < 1 or levels.shape[-1] > self.steps:
            raise Refusal(f"an episode has {self.steps} steps, got actions of shape {levels.shape}")
        wrong = levels[(levels < 0) | (levels >= self.levels)]
        if len(wrong):
            raise Refusal(f"a level must lie in 0..{self.dense_level}, got {wrong[0]}")
        return levels

    def _dense_sites(self, levels: NDArray[np.int64]) -> NDArray[np.bool_]:
        dense = (levels == self.dense_level) @ self.membership[:, : levels.shape[-1]].T
        return np.asarray(dense > 0, dtype=np.bool_)

    def _fits(self, dense: NDArray[np.bool_]) -> NDArray[np.bool_]:
        needed = np.where(dense, self._largest, self._smallest).sum(axis=-1)
        return np.asarray(needed <= self.target_parameters, dtype=np.bool_)


def _finite(name: str, values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (count,) or not np.isfinite(values).all():
        raise Refusal(f"{name} must be {count} finite numbers, got shape {values.shape}")
    return values


def _target(menu: Menu, target_kept: float) -> int:
    """Returns the largest number of parameters that may be kept."""
    if not 0 < target_kept <= 1:
        raise Refusal(f"target_kept must lie in (0, 1], got {target_kept}")
    target = math.floor(target_kept * menu.dense_parameters + 1e-6)
    if target < menu.smallest_parameters:
        least = menu.smallest_parameters / menu.dense_parameters
        nearest = math.ceil(least * 1000) / 1000
        raise Refusal(
            f"target_kept {target_kept} is below what the smallest options keep, {least:.4f}; nearest: {nearest:.3f}"
        )
    return target
