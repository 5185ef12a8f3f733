"""Lists the routes, the equivalent ways to compute y = Ŵ x from MPO cores, and estimates their costs.

Knows integers only: shapes, bonds and token counts. Does not know tensors or devices; `compression.layers.planner`
measures costs.

    first, last   contract the cores with the activations, from the first core on or from the last one back
    pivoted       `pivoted-lowrank` only: copy the identity rows, compute the others, and permute the outputs
    transposed    as pivoted, on transposed activations, so that the permutation moves whole rows
    padded        as pivoted, with kept copies of the factors whose χ is padded with zeros to a multiple of 16, so that
                  rows are aligned
    rebuild       form Ŵ for this call, then multiply
    expanded-*    as first or last, with plain cores kept in addition to the stored pivoted cores
    merged        form Ŵ once and keep it
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
    "formed_quickly",
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
"""Token counts for which plans are made. Every other count uses the route of the count nearest to it in ratio."""

# A route that keeps more than the stored parameters must cost at most this fraction of the best one that does not.
_WORTH = 0.98
# Seconds per operation, multiply-add, weight read and activation moved, on a server core that is a few years old.
_OPERATION, _MULTIPLY_ADD, _WEIGHT, _MOVE = 4e-6, 2e-11, 2e-10, 5e-10
# Token counts for which transposed products are faster, and the fraction of the time that they take.
_MIDDLING, _TRANSPOSED = range(16, 256), 0.85
_COMPILED, _FORMED = 32, 4e8
"""Tokens from which a CPU forms Ŵ to multiply 16-bit numbers, if that takes so many multiply-adds at most."""
_MANY = 1024
"""Tokens of 16 bits from which a pass and its gradients take 0.9 of the time on a CPU if the matrix is formed."""


@dataclass(frozen=True)
class Plan:
    """States the route of a layer for every number of tokens.

    Attributes:
        steps: pairs (tokens, route), ascending: the route for at most that many tokens. The last route has no limit.
    """

    steps: tuple[tuple[int, Route], ...]

    def route(self, tokens: int) -> Route:
        """Returns the route of a call with this many tokens, summed over all sequences."""
        for limit, route in self.steps[:-1]:
            if tokens <= limit:
                return route
        return self.steps[-1][1]

    @property
    def used(self) -> frozenset[Route]:
        """All routes that some number of tokens takes."""
        return frozenset(route for _, route in self.steps)


def routes(legs: Legs) -> tuple[Route, ...]:
    """Returns the routes that a topology can take.

    For `lowrank` this excludes contraction from the first core on, which would only enlarge the intermediate result.
    """
    if is_lowrank(legs):
        return ("pivoted", "transposed", "padded", "rebuild", "expanded-last", "merged") if legs.pivoted else _PLAIN[1:]
    return ("first", "last", "rebuild", "expanded-first", "expanded-last", "merged") if legs.pivoted else _PLAIN


def extra_entries(legs: Legs, chi: int, route: Route) -> int:
    """Returns the number of entries that a route keeps in addition to the stored parameters."""
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
    """Returns the plan with the cheapest route for each token count, from seconds per token count and route.

    "memory" uses only routes that keep nothing in addition to the stored parameters. "latency" also uses the other
    routes, if they cost at most 0.98 times the best of the former.
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


def in_training(legs: Legs, chi: int, tokens: int, gpu: bool, reduced: bool = False) -> Route | None:
    """Returns the route to use in training instead of the plan's, or None to follow the plan.

    On a CPU, a pivoted low-rank layer with small χ is trained through plain cores: this takes χ² more multiply-adds per
    token, but permutes no activations in the forward and backward pass. On a GPU, the matrix is formed if there are
    more tokens than χ: products are limited by memory traffic, and one product with the matrix reads and writes fewer
    activations than two products with factors. A CPU forms the matrix for many tokens of 16 bits, as it multiplies them
    fast and moves them as slowly as others.

    Args:
        reduced: whether a CPU multiplies 16-bit numbers.
    """
    if gpu:
        return "rebuild" if tokens > chi else None
    if reduced and tokens >= _MANY and formed_quickly(legs, chi, tokens):
        return "rebuild"
    small = 2 * chi <= min(legs.out_legs[0], legs.in_legs[-1])
    return "expanded-last" if legs.pivoted and is_lowrank(legs) and small else None


def formed_quickly(legs: Legs, chi: int, tokens: int) -> bool:
    """Returns whether a CPU should form Ŵ to multiply it with 16-bit numbers.

    oneDNN compiles kernels for every number of tokens, χ and matrix, which take a millisecond and 0.4 MB each. Ŵ has
    the shape of its site, and is formed in float32, whose products need no such kernels; that of a large matrix takes
    longer than they do.
    """
    return tokens >= _COMPILED and legs.rebuild_multiply_adds(chi) <= _FORMED


@cache
def modelled(legs: Legs, chi: int, tokens: int) -> Mapping[Route, float]:
    """Estimates the seconds of every route from its operations, multiply-adds, weights read and activations moved, each
    at a fixed price of a server core. The estimates only distinguish routes whose costs differ by several times."""
    return {route: _seconds(legs, chi, tokens, route) for route in routes(legs)}


@cache
def default_plan(legs: Legs, chi: int) -> Plan:
    """Returns the plan of a layer without measured costs: the plan for "memory" by estimated costs."""
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
    """Returns the number of entries per token of every intermediate result."""
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
    """Whether there are two cores, the left one with all output legs and the right one with all input legs."""
    return len(legs.out_legs) == 2 and legs.in_legs[0] == 1 and legs.out_legs[1] == 1
