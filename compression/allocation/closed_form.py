"""Allocates a parameter budget: chooses one option per site from predicted costs alone.

Uses NumPy only; does not know models. `lagrangian` minimises the weighted sum of predicted costs over the lower convex
hulls of the menus; `uniform` gives every site the same kept fraction. Both return option indices, which `to_schedule`
turns into a schedule.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from compression.allocation.menu import Menu, SiteMenu, convex_hull
from compression.numerics.legs import resolve
from compression.refusal import Refusal
from compression.schedule import DENSE, Choice, Schedule
from compression.sites import Site

__all__ = ["lagrangian", "log_price", "lower_hull", "to_schedule", "uniform", "uniform_schedule"]


@dataclass(frozen=True, eq=False)
class _Segments:
    """Lists the edges of the convex hulls of all sites.

    Attributes:
        site: site of each edge.
        end: option at the upper end of each edge.
        parameters: parameters that moving along the edge adds.
        log_slope: natural logarithm of the decrease in cost per added parameter.
    """

    site: NDArray[np.int64]
    end: NDArray[np.int64]
    parameters: NDArray[np.int64]
    log_slope: NDArray[np.float64]


_segments_of: weakref.WeakKeyDictionary[Menu, _Segments] = weakref.WeakKeyDictionary()


def lagrangian(
    menu: Menu,
    target_parameters: int,
    log_weights: NDArray[np.float64] | None = None,
    dense: frozenset[int] = frozenset(),
) -> NDArray[np.int64]:
    """Returns the options, one index per site, that minimise Σ_s exp(log_weights[s])·cost_s within the budget.

    The budget requires Σ_s parameters_s ≤ target_parameters. Hull edges are bought in descending order of weighted gain
    per parameter, which gives the Lagrangian solution at the price of the last edge bought. The rest of the budget is
    spent on further options, on the hull or not, as long as one fits. Adding a constant to all log weights does not
    change the result.

    Args:
        menu: options of every site.
        target_parameters: budget over all sites, in matrix entries.
        log_weights: natural logarithm of the factor on each site's cost, (sites,); None weights all sites equally.
        dense: indices of sites that must stay dense.

    Raises:
        ValueError: the smallest options, with the sites in `dense` dense, exceed the budget.
    """
    segments = _segments_of.get(menu) or _segments_of.setdefault(menu, _pool(menu))
    indices = np.zeros(len(menu.sites), dtype=np.int64)
    for site in dense:
        indices[site] = len(menu.sites[site].choices) - 1
    left = target_parameters - menu.parameters(indices)
    if left < 0:
        raise Refusal(
            f"{target_parameters} parameters cannot be met: the smallest options need {target_parameters - left}"
        )
    weight = np.zeros(len(menu.sites)) if log_weights is None else np.asarray(log_weights, dtype=np.float64)
    order = np.argsort(-(segments.log_slope + weight[segments.site]), kind="stable")
    order = order[~np.isin(segments.site[order], list(dense))]
    bought = np.cumsum(segments.parameters[order]) <= left
    chosen = order[bought]
    np.maximum.at(indices, segments.site[chosen], segments.end[chosen])
    left -= int(segments.parameters[chosen].sum())
    _spend_rest(menu, indices, left, order[len(chosen) :], segments)
    return indices


def log_price(menu: Menu, target_parameters: int) -> float:
    """Returns the natural logarithm of the price, in nats per parameter, at which `lagrangian` stops.

    The price lies between the slopes of the last edge bought in order and of the next one. Returns 0 if no site has a
    choice.
    """
    segments = _segments_of.get(menu) or _segments_of.setdefault(menu, _pool(menu))
    if not len(segments.site):
        return 0.0
    order = np.argsort(-segments.log_slope, kind="stable")
    bought = int((np.cumsum(segments.parameters[order]) <= target_parameters - menu.smallest_parameters).sum())
    around = segments.log_slope[order[max(0, bought - 1) : bought + 1]]
    return float(around.mean())


def uniform(menu: Menu, target_parameters: int) -> NDArray[np.int64]:
    """Returns the option index per site at the same kept fraction for all sites.

    Each site takes its largest option within that fraction, which is never dense if the fraction is below 1. Parameters
    left over buy the next option for single sites, in order.

    Raises:
        ValueError: the smallest options exceed the budget.
    """
    sizes = [site.parameters for site in menu.sites]
    return np.array(_uniform(sizes, target_parameters), dtype=np.int64)


def uniform_schedule(sites: Sequence[Site], topology: str, metric: str, target_parameters: int) -> Schedule:
    """Returns a schedule with one topology and the same kept fraction at every site.

    A site stays dense if it must, or if no χ of the topology saves parameters.

    Raises:
        ValueError: the topology is unknown, or χ = 1 everywhere exceeds the budget.
    """
    sizes = []
    for site in sites:
        legs = resolve(topology, site.out_features, site.in_features)
        largest = 0 if site.dense_because else legs.break_even_chi
        sizes.append(np.array([*map(legs.parameters, range(1, largest + 1)), site.parameters]))
    picks = _uniform(sizes, target_parameters)
    return Schedule(
        tuple(
            (site.name, DENSE if pick == len(size) - 1 else Choice(topology, pick + 1, metric))
            for site, size, pick in zip(sites, sizes, picks, strict=True)
        )
    )


def _uniform(sizes: Sequence[NDArray[np.int64]], target: int) -> list[int]:
    """Returns the largest option per site within the common fraction; the rest buys single steps, in site order."""
    smallest, dense = sum(int(size[0]) for size in sizes), sum(int(size[-1]) for size in sizes)
    if target < smallest:
        raise Refusal(f"{target} parameters cannot be met: the smallest options need {smallest}")
    picks = [max(0, int(np.searchsorted(size, target / dense * size[-1], side="right")) - 1) for size in sizes]
    left = target - sum(int(size[pick]) for size, pick in zip(sizes, picks, strict=True))
    for number, (size, pick) in enumerate(zip(sizes, picks, strict=True)):
        if pick + 1 < len(size) - 1 and (price := int(size[pick + 1] - size[pick])) <= left:
            picks[number], left = pick + 1, left - price
    return picks


def to_schedule(menu: Menu, indices: NDArray[np.int64]) -> Schedule:
    """Returns the schedule that takes option `indices[s]` at site s."""
    return Schedule(
        tuple(pair for options, index in zip(menu.sites, indices, strict=True) for pair in options.assigned(int(index)))
    )


def _pool(menu: Menu) -> _Segments:
    site, end, parameters, log_slope = [], [], [], []
    for number, options in enumerate(menu.sites):
        hull = lower_hull(options)
        for start, stop in pairwise(hull):
            price = int(options.parameters[stop] - options.parameters[start])
            gain = options.cost[start] - options.cost[stop]
            site.append(number)
            end.append(stop)
            parameters.append(price)
            log_slope.append(np.log(gain) - np.log(price))
    return _Segments(
        np.array(site, dtype=np.int64),
        np.array(end, dtype=np.int64),
        np.array(parameters, dtype=np.int64),
        np.array(log_slope, dtype=np.float64),
    )


def lower_hull(options: SiteMenu) -> list[int]:
    """Returns the options on the lower convex hull of cost over parameters, up to the one of least cost."""
    hull = convex_hull(options.parameters, options.cost)
    return hull[: 1 + int(np.argmin(options.cost[hull]))]


def _spend_rest(
    menu: Menu, indices: NDArray[np.int64], left: int, order: NDArray[np.int64], segments: _Segments
) -> None:
    """Buy further edges in order as long as one fits; then spend the rest on the sites whose next edge did not fit."""
    cheapest = int(segments.parameters.min(initial=1))
    blocked: list[int] = []
    for edge in order:
        if left < cheapest:
            break
        site = int(segments.site[edge])
        if site in blocked:
            continue
        price = int(menu.sites[site].parameters[segments.end[edge]] - menu.sites[site].parameters[indices[site]])
        if price <= left:
            indices[site], left = segments.end[edge], left - price
        else:
            blocked.append(site)
    for site in blocked:
        options = menu.sites[site]
        now = int(options.parameters[indices[site]])
        reach = int(np.searchsorted(options.parameters, now + left, side="right")) - 1
        if reach > indices[site] and options.cost[reach] < options.cost[indices[site]]:
            left -= int(options.parameters[reach]) - now
            indices[site] = reach
