"""Prices: what a parameter is worth at an allocation, and how far a schedule departs from the closed form.

NumPy only. At the closed form every site stands where its predicted cost falls by one common price per further
parameter. A schedule that is not the closed form stands there too once each site's cost is multiplied by a factor of
its own; the natural logarithms of these factors describe the schedule in a way that another budget, or another model,
can follow. They are the log weights of `compression.allocation.closed_form.lagrangian`.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from compression.allocation.closed_form import lagrangian, log_price, lower_hull
from compression.allocation.menu import Menu

__all__ = ["departures"]

_INSIDE = 1e-6  # log price by which a departure enters its interval, so that no two edges tie at its end


def departures(menu: Menu, indices: NDArray[np.int64]) -> NDArray[np.float64]:
    """The log weights nearest to 0, (sites,), at which the Lagrangian gives option `indices[s]` to site s.

    They are relative to the closed form that spends as much: a site that has the same option there has 0. Exact for
    options on the lower convex hulls of the menus; one above its hull is taken for the hull edge that passes under it.
    """
    spent = menu.parameters(indices)
    price, agreed = log_price(menu, spent), lagrangian(menu, spent) == indices
    weights = [_nearest(*_interval(menu, site, int(index)), price) for site, index in enumerate(indices)]
    return np.where(agreed, 0.0, np.array(weights, dtype=np.float64))


def _nearest(low: float, high: float, price: float) -> float:
    """The point of [price − high, price − low] nearest to 0, a little inside."""
    start, stop = price - high, price - low
    if start <= 0 <= stop:
        return 0.0
    inside = min(_INSIDE, (stop - start) / 2)
    return start + inside if start > 0 else stop - inside


def _interval(menu: Menu, site: int, index: int) -> tuple[float, float]:
    """Log slopes of cost per parameter behind and before an option: (of the next hull edge, of the last one)."""
    options = menu.sites[site]
    hull = lower_hull(options)
    slopes = [
        math.log(float(options.cost[start] - options.cost[stop]))
        - math.log(int(options.parameters[stop] - options.parameters[start]))
        for start, stop in pairwise(hull)
    ]
    place = int(np.searchsorted(hull, index))  # the first vertex that is not smaller
    if place == len(hull):  # beyond the last vertex the cost falls no further
        place, index = len(hull) - 1, hull[-1]
    last = slopes[place - 1] if place else math.inf
    if hull[place] != index:
        return last, last
    return (slopes[place] if place < len(slopes) else -math.inf), last
