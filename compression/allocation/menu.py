"""Defines menus: the options of every site, each with its parameters, multiply-adds and predicted loss of quality.

Uses NumPy only. Does not know where the predicted costs come from; `compression.decomposition.factors` provides them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from compression.numerics.legs import resolve
from compression.refusal import Refusal
from compression.schedule import DENSE, Choice, Joint, Schedule
from compression.sites import Site, Unit, members
from compression.size import Price, choice_multiply_adds, choice_parameters

__all__ = [
    "FEWEST",
    "Menu",
    "Option",
    "SiteMenu",
    "aligned",
    "convex_hull",
    "dense_menu",
    "envelope",
    "nested_options",
    "tail_costs",
    "undominated",
    "whole",
    "worth_their_time",
]

FEWEST = 8
"""Smallest number of options that alignment leaves."""


@dataclass(frozen=True, eq=False)
class SiteMenu:
    """Lists the options of one site in ascending order of parameters; the last one is dense with cost 0.

    Attributes:
        site: the site, or the unit of several.
        choices: the options; of a unit, all are joint.
        parameters: what every option takes of the budget, int64, strictly ascending: its stored entries, or, by
            bytes, its bytes.
        cost: predicted KL to the dense model in nats per token, float64, never negative.
        multiply_adds: multiply-adds per token of every option, int64, computed in the cheapest way.
    """

    site: Site | Unit
    choices: tuple[Choice | Joint, ...]
    parameters: NDArray[np.int64]
    cost: NDArray[np.float64]
    multiply_adds: NDArray[np.int64]

    def __post_init__(self) -> None:
        if not len(self.choices) == len(self.parameters) == len(self.cost) == len(self.multiply_adds):
            raise Refusal(f"menu of {self.site.name}: every option needs parameters, cost and multiply-adds")
        if not self.choices[-1].is_dense or self.cost[-1] != 0:
            raise Refusal(f"menu of {self.site.name}: the last option must be dense at cost 0")
        if not np.isfinite(self.cost).all() or (self.cost < 0).any():
            raise Refusal(f"menu of {self.site.name}: costs must be finite and not negative")
        if (np.diff(self.parameters) <= 0).any():
            raise Refusal(f"menu of {self.site.name}: options must ascend strictly in parameters")

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that an option chooses for: one, or those of the unit."""
        return members(self.site)

    def assigned(self, index: int) -> tuple[tuple[str, Choice], ...]:
        """Returns the names of the sites with their choices under one option."""
        choice = self.choices[index]
        taken = choice.choices if isinstance(choice, Joint) else (choice,)
        return tuple((site.name, one) for site, one in zip(self.sites, taken, strict=True))

    def taken(self, schedule: Schedule) -> Choice | Joint:
        """Returns what a schedule chooses here, which need not be an option."""
        taken = tuple(schedule[site.name] for site in self.sites)
        return Joint(taken) if isinstance(self.site, Unit) else taken[0]

    def index(self, schedule: Schedule) -> int:
        """Returns the number of the option that a schedule chooses here.

        Raises:
            ValueError: the menu has no such option.
        """
        found = self._places.get(self.taken(schedule))
        if found is None:
            raise Refusal(f"the schedule chooses a form of {self.site.name} that its menu does not offer")
        return found

    @cached_property
    def _places(self) -> Mapping[Choice | Joint, int]:
        return {choice: place for place, choice in enumerate(self.choices)}


@dataclass(frozen=True, eq=False)
class Menu:
    """Holds the menus of all sites of a model, in discovery order."""

    sites: tuple[SiteMenu, ...]

    @cached_property
    def dense_parameters(self) -> int:
        """Number of entries, or bytes, of all sites if every site stays dense."""
        return sum(int(menu.parameters[-1]) for menu in self.sites)

    @cached_property
    def smallest_parameters(self) -> int:
        """Number of entries, or bytes, of all sites if every site takes its smallest option."""
        return sum(int(menu.parameters[0]) for menu in self.sites)

    def parameters(self, indices: NDArray[np.int64]) -> int:
        """Returns the number of entries, or bytes, of all sites, given one option index per site."""
        return sum(int(menu.parameters[index]) for menu, index in zip(self.sites, indices, strict=True))

    def cost(self, indices: NDArray[np.int64]) -> float:
        """Returns the sum of the predicted costs in nats per token, given one option index per site."""
        return sum(float(menu.cost[index]) for menu, index in zip(self.sites, indices, strict=True))


def dense_menu(site: Site, price: Price = choice_parameters) -> SiteMenu:
    """Returns the menu of a site that must stay dense; `price` as for `envelope`."""
    size, adds = (np.array([value], dtype=np.int64) for value in (price(site, DENSE), site.parameters))
    return SiteMenu(site, (DENSE,), parameters=size, cost=np.zeros(1), multiply_adds=adds)


@dataclass(frozen=True)
class Option:
    """Holds a choice for one site or unit with its predicted cost in nats per token."""

    choice: Choice | Joint
    cost: float


def nested_options(
    topology: str,
    metric: str,
    spectrum: NDArray[np.float64],
    site: Site,
    max_chi: int | None = None,
    widths: tuple[int, ...] = (),
) -> list[Option]:
    """Returns options of `topology` at every χ that saves parameters, where one decomposition serves every χ.

    Args:
        topology: a topology name.
        metric: the metric of the decomposition.
        spectrum: singular values of the whitened matrix, descending. The cost of χ is ½ Σ_{i>χ} σ_i². If the matrix was
            whitened by C and G, this is ½·tr(G E C Eᵀ), the second-order KL of the error E under the Kronecker-factored
            Fisher metric (Martens & Grosse 2015, eq. 3).
        site: the site.
        max_chi: largest χ to offer; must not exceed the number of known singular values.
        widths: widths of the site's bonds, to which the matrix has been cut; empty if it has not.
    """
    legs = resolve(topology, *site.shape(widths))
    tail = tail_costs(spectrum)
    last = min(legs.break_even_chi, max_chi or len(spectrum))
    return [Option(Choice(topology, chi, metric, widths), float(tail[chi])) for chi in range(1, last + 1)]


def tail_costs(spectrum: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns ½ Σ_{i>χ} σ_i² for every χ from 0 to the number of singular values, (values + 1,)."""
    return 0.5 * np.append(np.cumsum(np.square(spectrum[::-1]))[::-1], 0.0)


def undominated(sizes: NDArray[np.int64], costs: NDArray[np.float64]) -> NDArray[np.int64]:
    """Returns the indices of the options cheaper than all options that are not larger, in ascending order of size."""
    order = np.lexsort((costs, sizes))
    before = np.minimum.accumulate(np.append(np.inf, costs[order][:-1]))
    return order[costs[order] < before]


def envelope(site: Site | Unit, options: Iterable[Option], price: Price = choice_parameters) -> SiteMenu:
    """Returns the menu of undominated options: dense, and every option cheaper than all options that are not larger.

    Args:
        price: what an option takes of the budget.
    """
    dense = Joint((DENSE,) * len(site.sites)) if isinstance(site, Unit) else DENSE
    whole_price = price(site, dense)
    sized = [(price(site, option.choice), option) for option in options]
    kept: list[tuple[int, Option]] = []
    for size, option in sorted(sized, key=lambda pair: (pair[0], pair[1].cost, _topologies(pair[1].choice))):
        if size < whole_price and (not kept or (size > kept[-1][0] and option.cost < kept[-1][1].cost)):
            kept.append((size, option))
    choices = (*(option.choice for _, option in kept), dense)
    return SiteMenu(
        site=site,
        choices=choices,
        parameters=np.array([*(size for size, _ in kept), whole_price], dtype=np.int64),
        cost=np.array([*(option.cost for _, option in kept), 0.0], dtype=np.float64),
        multiply_adds=np.array([choice_multiply_adds(site, choice) for choice in choices], dtype=np.int64),
    )


def _topologies(choice: Choice | Joint) -> tuple[str, ...]:
    return tuple(one.topology for one in choice.choices) if isinstance(choice, Joint) else (choice.topology,)


def worth_their_time(menu: Menu, burdens: Sequence[NDArray[np.float64]]) -> Menu:
    """Returns the menu without the options that are not optimal at any price once a burden is added to every cost.

    For each site the remaining options are the vertices of the lower convex hull of cost plus burden over parameters,
    and always the first and the last option. Their costs do not change, so an allocation over the smaller menu need not
    know the burden, and loses little compared with an allocation over both. A large burden, such as time, leaves dense
    and the few χ at which a factor pays.

    Args:
        burdens: per site, an additional cost of every option, in the unit of the costs.
    """
    sites = []
    for options, burden in zip(menu.sites, burdens, strict=True):
        kept = sorted({0, *convex_hull(options.parameters, options.cost + burden), len(options.choices) - 1})
        sites.append(_only(options, kept))
    return Menu(tuple(sites))


def aligned(options: SiteMenu, entries: int) -> SiteMenu:
    """Returns the menu of a site without bond dimensions that are not multiples of `entries`, whose products are slow.

    The first and the last option stay. A menu that would keep fewer than eight options keeps all.
    """
    last = len(options.choices) - 1
    chis = [0 if isinstance(choice, Joint) else choice.chi for choice in options.choices]
    kept = [index for index, chi in enumerate(chis) if index in (0, last) or chi % entries == 0]
    return options if len(kept) < FEWEST else _only(options, kept)


def whole(options: SiteMenu) -> SiteMenu:
    """Returns the menu of a unit with the options that keep all of its bond, or nothing of it."""
    kept = [index for index, choice in enumerate(options.choices) if not any(_widths(choice))]
    return _only(options, kept)


def _widths(choice: Choice | Joint) -> tuple[int, ...]:
    return choice.widths if isinstance(choice, Choice) else tuple(n for each in choice.choices for n in each.widths)


def _only(options: SiteMenu, kept: list[int]) -> SiteMenu:
    choices = tuple(options.choices[index] for index in kept)
    figures = {name: getattr(options, name)[kept] for name in ("parameters", "cost", "multiply_adds")}
    return replace(options, choices=choices, **figures)


def convex_hull(x: NDArray[np.int64], y: NDArray[np.float64]) -> list[int]:
    """Returns the indices of the vertices of the lower convex hull of y over x. `x` must ascend."""
    hull: list[int] = []
    for index in range(len(x)):
        while len(hull) >= 2 and (y[index] - y[hull[-2]]) * (x[hull[-1]] - x[hull[-2]]) <= (
            y[hull[-1]] - y[hull[-2]]
        ) * (x[index] - x[hull[-2]]):
            hull.pop()
        hull.append(index)
    return hull
