"""Routes: the equal ways to compute y = Ŵ x from MPO cores, which fit a layer, and estimates of what they cost.

Integers in, names and seconds out; knows neither tensors nor devices. Measured costs are the business of
`compression.layers.planner`.

    first, last   the cores are contracted with the activations, from the first core on or from the last one back
    pivoted       `pivoted-lowrank` only: identity rows are copied, the others computed, and the outputs put in order
    transposed    the same on transposed activations, so that whole rows are put in order
    padded        as pivoted, with copies of the factors kept whose χ is rounded up to 16 by zeros: aligned rows
    rebuild       Ŵ is formed for this call, then multiplied
    expanded-*    as first or last, with the pivoted cores kept beside their stored form as plain cores
    merged        Ŵ is formed once and kept
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import isqrt
from typing import Literal, get_args

from compression.numerics.legs import Legs
from compression.numerics.pivoted_product import padded

__all__ = [
    "OPTIMIZE",
    "TOKENS",
    "Optimize",
    "Plan",
    "Route",
    "choose",
    "default_plan",
    "extra_entries",
    "in_training",
    "is_lowrank",
    "modelled",
    "routes",
]

Route = Literal[
    "first", "last", "pivoted", "transposed", "padded", "rebuild", "expanded-first", "expanded-last", "merged"
]
Optimize = Literal["memory", "latency"]

_PLAIN: tuple[Route, ...] = ("first", "last", "rebuild", "merged")

OPTIMIZE: tuple[str, ...] = get_args(Optimize)
TOKENS = (1, 8, 64, 512)
"""Token counts that plans are made for; every other count follows the one nearest to it in ratio."""

_WORTH = (
    0.98  # a route that keeps more than the stored parameters must cost at most this share of the best that does not
)
# A few years old server core: seconds per operation, multiply-add, weight read, and activation moved.
_OPERATION, _MULTIPLY_ADD, _WEIGHT, _MOVE = 4e-6, 2e-11, 2e-10, 5e-10
# Tokens for which products with one output after the other in memory are faster, and what share of the time they take.
_MIDDLING, _TRANSPOSED = range(16, 256), 0.85


@dataclass(frozen=True)
class Plan:
    """Which route a layer takes for how many tokens.

    Attributes:
        steps: (tokens, route) ascending: the route for at most that many tokens; the last one has no upper end.
    """

    steps: tuple[tuple[int, Route], ...]

    def route(self, tokens: int) -> Route:
        """The route for a call with this many tokens, of all sequences together."""
        for limit, route in self.steps[:-1]:
            if tokens <= limit:
                return route
        return self.steps[-1][1]

    @property
    def used(self) -> frozenset[Route]:
        """Every route that some token count takes."""
        return frozenset(route for _, route in self.steps)


def routes(legs: Legs) -> tuple[Route, ...]:
    """The routes that fit a topology. From the first core on, `lowrank` would only spread its input: not among them."""
    if is_lowrank(legs):
        return ("pivoted", "transposed", "padded", "rebuild", "expanded-last", "merged") if legs.pivoted else _PLAIN[1:]
    return ("first", "last", "rebuild", "expanded-first", "expanded-last", "merged") if legs.pivoted else _PLAIN


def extra_entries(legs: Legs, chi: int, route: Route) -> int:
    """Entries kept beside the stored parameters for a route."""
    if route == "merged":
        return legs.dense_parameters
    if route == "padded":
        wide = padded(chi)
        return wide * (legs.in_legs[-1] + legs.out_legs[0] - chi)
    if route in ("expanded-first", "expanded-last"):
        last = legs.bonds(chi)[-2] * legs.out_legs[-1] * legs.in_legs[-1]
        return Legs(legs.out_legs, legs.in_legs).parameters(chi) - last
    return 0


def choose(costs: Mapping[int, Mapping[Route, float]], legs: Legs, chi: int, optimize: Optimize) -> Plan:
    """The cheapest route for each token count, from seconds per token count and route.

    "memory" takes only routes that keep nothing beside the stored parameters. "latency" takes the others too where they
    cost at most 0.98 of the best of those.
    """
    steps: list[tuple[int, Route]] = []
    for tokens, seconds in sorted(costs.items()):
        free = {route: cost for route, cost in seconds.items() if not extra_entries(legs, chi, route)}
        best = min(free, key=free.__getitem__)
        fastest = min(seconds, key=seconds.__getitem__)
        if optimize == "latency" and seconds[fastest] <= _WORTH * free[best]:
            best = fastest
        steps.append((tokens, best))
    limits = [isqrt(low * high) for (low, _), (high, _) in pairwise(steps)]
    return Plan(tuple((limit, route) for limit, (_, route) in zip([*limits, steps[-1][0]], steps, strict=True)))


def in_training(legs: Legs, chi: int, tokens: int, gpu: bool) -> Route | None:
    """The route that gradients ask for whatever the plan says, None if the plan's.

    Where χ is small a pivoted low rank is trained through plain cores: χ² multiply-adds more a token, but no activation
    is put in order, neither forwards nor backwards. A GPU forms the matrix where more tokens than χ share it: its
    products are limited by traffic, and one with the matrix reads and writes fewer activations than two with factors.
    """
    if gpu:
        return "rebuild" if tokens > chi else None
    small = 2 * chi <= min(legs.out_legs[0], legs.in_legs[-1])
    return "expanded-last" if legs.pivoted and is_lowrank(legs) and small else None


@cache
def modelled(legs: Legs, chi: int, tokens: int) -> Mapping[Route, float]:
    """Estimated seconds of every route: operations, multiply-adds, weights read and activations moved, each at a fixed
    price of a server core. Good enough to tell routes apart that differ several times; never more precise than that."""
    return {route: _seconds(legs, chi, tokens, route) for route in routes(legs)}


@cache
def default_plan(legs: Legs, chi: int) -> Plan:
    """What a layer does of which nothing was measured: the plan of "memory" by estimated costs."""
    return choose({tokens: modelled(legs, chi, tokens) for tokens in TOKENS}, legs, chi, "memory")


def _seconds(legs: Legs, chi: int, tokens: int, route: Route) -> float:
    stored, cores = legs.parameters(chi), len(legs.out_legs)
    plain = Legs(legs.out_legs, legs.in_legs)
    if route == "merged":
        return _price(1, tokens * legs.dense_parameters, legs.dense_parameters, 0)
    if route == "rebuild":
        dense = legs.dense_parameters
        return _price(3 * cores, tokens * dense + legs.rebuild_multiply_adds(chi), stored + dense, dense)
    if route in ("pivoted", "transposed", "padded"):
        faster = _TRANSPOSED if route == "transposed" and tokens in _MIDDLING else 1.0
        return faster * _price(4, tokens * stored, stored, tokens * plain.out_legs[0])
    last_first = route.endswith("last")
    arithmetic = tokens * plain.multiply_adds_from(chi, last_first)
    kept = plain.parameters(chi)
    largest = max(_states(plain, chi, last_first))
    made = kept if legs.pivoted and route in ("first", "last") else 0
    operations = 2 * cores + (3 * cores if made else 0)
    return _price(operations, arithmetic, kept, made + (tokens * largest if cores > 2 or not is_lowrank(plain) else 0))


def _price(operations: int, multiply_adds: int, weights: int, moved: int) -> float:
    return _OPERATION * operations + _MULTIPLY_ADD * multiply_adds + _WEIGHT * weights + _MOVE * moved


def _states(legs: Legs, chi: int, last_first: bool) -> list[int]:
    """Entries per token of every intermediate result."""
    bonds, count = legs.bonds(chi), len(legs.out_legs)
    sizes = []
    done, rest = 1, 1
    for leg in legs.in_legs:
        rest *= leg
    for core in reversed(range(count)) if last_first else range(count):
        rest //= legs.in_legs[core]
        done *= legs.out_legs[core]
        sizes.append(done * rest * bonds[core if last_first else core + 1])
    return sizes


def is_lowrank(legs: Legs) -> bool:
    """Whether the left of two cores has all output legs and the right one all input legs."""
    return len(legs.out_legs) == 2 and legs.in_legs[0] == 1 and legs.out_legs[1] == 1
