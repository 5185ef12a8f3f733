"""Expresses how far a schedule departs from the closed form, as log weights on the predicted costs of the sites.

Uses NumPy only; does not know models. In the closed form, one further parameter lowers the predicted cost by the same
amount, the price, at every site. Any other schedule also has this property once each site's cost is multiplied by its
own factor. The natural logarithms of these factors describe the schedule in a form that can be applied to another
budget or another model. They are the log weights of `compression.allocation.closed_form.lagrangian`.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from compression.allocation.closed_form import lagrangian, log_price, lower_hull
from compression.allocation.menu import Menu

__all__ = ["departures"]

_INSIDE = 1e-6  # distance of a departure from the end of its interval, in log price; avoids ties between edges


def departures(menu: Menu, indices: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns the log weights nearest to 0, (sites,), at which `lagrangian` gives option `indices[s]` to site s.

    The weights are relative to the closed form with as many parameters: a site with the same option there has weight 0.
    They are exact for options on the lower convex hulls of the menus. An option above its hull is represented by the
    hull edge below it.
    """
    spent = menu.parameters(indices)
    price, agreed = log_price(menu, spent), lagrangian(menu, spent) == indices
    weights = [_nearest(*_interval(menu, site, int(index)), price) for site, index in enumerate(indices)]
    return np.where(agreed, 0.0, np.array(weights, dtype=np.float64))


def _nearest(low: float, high: float, price: float) -> float:
    """Returns the point of [price − high, price − low] nearest to 0, slightly inside the interval."""
    start, stop = price - high, price - low
    if start <= 0 <= stop:
        return 0.0
    inside = min(_INSIDE, (stop - start) / 2)
    return start + inside if start > 0 else stop - inside


def _interval(menu: Menu, site: int, index: int) -> tuple[float, float]:
    """Returns the log slopes of cost per parameter around an option: of the next hull edge and of the previous one."""
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
