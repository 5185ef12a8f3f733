"""Finds the option per site that minimises the total predicted cost under a parameter budget, with a proven bound.

Uses NumPy only. Costs need not be convex: `compression.allocation.closed_form.lagrangian` buys edges of the lower
convex hulls and may spend the last parameters suboptimally, while this module solves the multiple-choice knapsack
problem itself.

The multiplier λ of the linear relaxation (Sinha & Zoltners 1979) gives every option the reduced cost

    r = cost + λ·parameters − min over the site's options of (cost + λ·parameters),   r ≥ 0.

An allocation costs exactly `floor` + Σ r + λ·(parameters left over), where `floor` is a lower bound of every
allocation. Hence an option or partial allocation whose reduced cost exceeds the gap between the best known allocation
and `floor` cannot be part of a better one (Dyer, Kayal & Walker 1984; Pisinger 1995). The sites with several remaining
options are split into two halves. For each half, dynamic programming lists the undominated partial allocations, and the
best pair is found by bisection (Horowitz & Sahni 1974). A first run with few partial allocations makes the gap small,
so later runs need few as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compression.allocation.closed_form import lagrangian
from compression.allocation.menu import Menu
from compression.refusal import Refusal

__all__ = ["Allocation", "knapsack"]

_LIMIT = 1 << 17  # largest number of partial allocations per half; if it is reached the result may be inexact
_FIRST = 1 << 10  # that number in the first run
_GROWTH = 4  # factor by which it grows from run to run

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Allocation:
    """Holds an allocation. It is optimal, up to rounding, if `bound == cost`.

    Attributes:
        indices: option index per site, (sites,).
        cost: predicted cost of the allocation, nats per token.
        bound: lower bound of the predicted cost of every allocation within the budget, nats per token.
    """

    indices: Integers
    cost: float
    bound: float


@dataclass(frozen=True, eq=False)
class _Half:
    """Lists partial allocations over some sites, ascending in `parameters` and descending in `cost`.

    Both are relative to the allocation of the relaxation. Step s of the trail holds, for every partial allocation, its
    row in step s − 1 and the option it takes.
    """

    sites: Integers
    parameters: Integers
    cost: Floats
    trail: tuple[tuple[NDArray[np.int32], NDArray[np.int32]], ...]
    dropped: float  # least reduced cost of the partial allocations dropped by the limit; infinite if there are none

    def options(self, row: int) -> Integers:
        """Returns the options that a partial allocation takes at `sites`."""
        taken = []
        for origin, option in reversed(self.trail):
            taken.append(option[row])
            row = int(origin[row])
        return np.array(taken[::-1], dtype=np.int64)


def knapsack(menu: Menu, target_parameters: int, tolerance: float = 0.0, limit: int = _LIMIT) -> Allocation:
    """Returns the allocation of least predicted cost with at most `target_parameters`.

    Args:
        menu: options of every site.
        target_parameters: budget over all sites, in matrix entries.
        tolerance: stop as soon as cost ≤ (1 + tolerance)·bound; at least 0.
        limit: largest number of partial allocations per half, at least 1. If more are needed, those of least reduced
            cost are kept; the result is then the best allocation found, with the bound that still holds.

    Raises:
        ValueError: the smallest options exceed the budget, or `tolerance` or `limit` is out of range.
    """
    if tolerance < 0 or limit < 1:
        raise Refusal(f"tolerance must be at least 0 and limit at least 1, got {tolerance} and {limit}")
    best = lagrangian(menu, target_parameters)
    parameters, cost = _padded(menu)
    price = _price(parameters, cost, target_parameters)
    priced = cost + price * parameters
    start = np.argmin(priced, axis=1)
    rows = np.arange(len(start))
    reduced = priced - priced[rows, start][:, None]
    relative = parameters - parameters[rows, start][:, None]
    spare = target_parameters - menu.parameters(start)
    bound = floor = menu.cost(start) - price * spare
    if menu.cost(start) < menu.cost(best):
        best = start
    run = min(_FIRST, limit)
    while menu.cost(best) > (1 + tolerance) * bound:
        gap = menu.cost(best) - floor
        several = np.flatnonzero((reduced <= gap).sum(axis=1) > 1)
        # Sites whose second-best option costs most come first, because few partial allocations survive them.
        second = np.sort(reduced[several], axis=1)[:, 1]
        several = several[np.argsort(-second, kind="stable")]
        left, right = (_half(several[part::2], relative, reduced, price, gap, run) for part in (0, 1))
        found = start.copy()
        for half, row in zip((left, right), _best_pair(left, right, spare), strict=True):
            found[half.sites] = half.options(row)
        if menu.parameters(found) <= target_parameters and menu.cost(found) < menu.cost(best):
            best = found
        bound = max(bound, min(menu.cost(best), floor + min(left.dropped, right.dropped)))
        if run == limit:
            break
        run = min(_GROWTH * run, limit)
    return Allocation(best, menu.cost(best), min(bound, menu.cost(best)))


def _padded(menu: Menu) -> tuple[Integers, Floats]:
    """Returns the parameters and costs of all options, (sites, most options); missing options have infinite cost."""
    shape = len(menu.sites), max(len(site.choices) for site in menu.sites)
    parameters, cost = np.zeros(shape, dtype=np.int64), np.full(shape, np.inf)
    for row, site in enumerate(menu.sites):
        parameters[row, : len(site.choices)] = site.parameters
        cost[row, : len(site.choices)] = site.cost
    return parameters, cost


def _price(parameters: Integers, cost: Floats, target: int) -> float:
    """Returns the least λ, up to rounding, at which the options of least cost + λ·parameters meet the target."""
    rows = np.arange(len(cost))

    def fits(price: float) -> bool:
        return int(parameters[rows, np.argmin(cost + price * parameters, axis=1)].sum()) <= target

    if fits(0.0):
        return 0.0
    # At the upper end, saving one parameter outweighs the largest possible cost of a site.
    low, high = 0.0, 2.0 * float(cost[np.isfinite(cost)].max())
    while not fits(high):
        high *= 2.0
    while low < (middle := (low + high) / 2) < high:
        if fits(middle):
            high = middle
        else:
            low = middle
    return high


def _half(sites: Integers, relative: Integers, reduced: Floats, price: float, gap: float, limit: int) -> _Half:
    """Returns the undominated partial allocations over `sites` of reduced cost ≤ gap, at most the `limit` cheapest."""
    parameters, cost, dropped = np.zeros(1, dtype=np.int64), np.zeros(1), np.inf
    trail = []
    for site in sites:
        options = np.flatnonzero(reduced[site] <= gap)
        grown = (relative[site, options][:, None] + parameters).ravel()
        paid = (reduced[site, options][:, None] + (cost + price * parameters)).ravel()
        alive = np.flatnonzero(paid <= gap)
        alive = alive[np.argsort(grown[alive], kind="stable")]
        cost = paid[alive] - price * grown[alive]
        least = np.append(np.inf, np.minimum.accumulate(cost)[:-1])
        alive = alive[cost < least]
        if len(alive) > limit:
            order = np.argsort(paid[alive], kind="stable")
            dropped = min(dropped, float(paid[alive[order[limit]]]))
            alive = alive[np.sort(order[:limit])]
        option, origin = np.divmod(alive, len(parameters))
        trail.append((origin.astype(np.int32), options[option].astype(np.int32)))
        parameters, cost = grown[alive], paid[alive] - price * grown[alive]
    return _Half(sites, parameters, cost, tuple(trail), dropped)


def _best_pair(left: _Half, right: _Half, spare: int) -> tuple[int, int]:
    """Returns the rows of the cheapest pair of partial allocations that together add at most `spare` parameters."""
    partner = np.searchsorted(right.parameters, spare - left.parameters, side="right") - 1
    cost = np.where(partner >= 0, left.cost + right.cost[partner], np.inf)
    row = int(np.argmin(cost))
    return row, max(0, int(partner[row]))
