"""Splits the dimensions of a matrix into the legs of an MPO, and translates topology names into legs.

Works on integers only. Every topology is an MPO: `lowrank` has two cores, the left one with all output legs and the
right one with all input legs, so its χ is the matrix rank. A pivoted topology represents the same matrices with χ²
fewer parameters per bond (see `compression.numerics.gauge`); at full χ it stores exactly as many entries as the dense
matrix.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from math import prod

from compression.refusal import Refusal

__all__ = ["Legs", "balanced", "leg_name", "resolve"]


@dataclass(frozen=True)
class Legs:
    """Describes an MPO of a matrix (out, in): out = product of `out_legs`, in = product of `in_legs`.

    Attributes:
        out_legs: output leg of every core.
        in_legs: input leg of every core.
        pivoted: whether the cores are stored without their redundant gauge parameters.
    """

    out_legs: tuple[int, ...]
    in_legs: tuple[int, ...]
    pivoted: bool = False

    def __post_init__(self) -> None:
        if len(self.out_legs) != len(self.in_legs) or len(self.out_legs) < 2:
            raise Refusal(f"legs need one output and one input leg per core, two cores or more, got {self}")
        if min(self.out_legs + self.in_legs) < 1:
            raise Refusal(f"legs must be positive integers, got {self}")

    @cached_property
    def full_bonds(self) -> tuple[int, ...]:
        """Bond dimensions at which any matrix of this shape is represented exactly."""
        sizes = [out_leg * in_leg for out_leg, in_leg in zip(self.out_legs, self.in_legs, strict=True)]
        return tuple(min(prod(sizes[:cut]), prod(sizes[cut:])) for cut in range(1, len(sizes)))

    @property
    def dense_parameters(self) -> int:
        """Number of entries of the dense matrix."""
        return prod(self.out_legs) * prod(self.in_legs)

    def bonds(self, chi: int) -> tuple[int, ...]:
        """Returns the bond dimensions under the cap χ: min(χ, full) for every inner bond, and 1 at both ends."""
        return (1, *(min(chi, full) for full in self.full_bonds), 1)

    def parameters(self, chi: int) -> int:
        """Returns the number of entries stored at bond dimension χ.

        They are the entries of all cores; if pivoted, without those of the identity in every core but the last.
        """
        bonds = self.bonds(chi)
        cores = zip(bonds[:-1], self.out_legs, self.in_legs, bonds[1:], strict=True)
        entries = sum(left * out_leg * in_leg * right for left, out_leg, in_leg, right in cores)
        return entries - self.pivoted * sum(bond * bond for bond in bonds[1:-1])

    def index_entries(self, chi: int) -> int:
        """Returns the number of integers stored besides the parameters: row indices of the identities, if pivoted."""
        return sum(self.bonds(chi)[1:-1]) if self.pivoted else 0

    def multiply_adds(self, chi: int) -> int:
        """Returns the multiply-adds per token of contracting the cores with activations from the cheaper end."""
        return min(self.multiply_adds_from(chi, last_first) for last_first in (False, True))

    def multiply_adds_from(self, chi: int, last_first: bool) -> int:
        """Returns the multiply-adds per token of contracting from the first core on, or from the last one back.

        If a pivoted first core has input leg 1, as in `lowrank`, and is contracted last, its identity is a copy and
        costs nothing.
        """
        bonds = self.bonds(chi)
        order = range(len(self.out_legs))
        total, done, rest = 0, 1, prod(self.in_legs)
        for core in reversed(order) if last_first else order:
            out_leg, in_leg = self.out_legs[core], self.in_legs[core]
            rest //= in_leg
            total += done * rest * bonds[core] * in_leg * out_leg * bonds[core + 1]
            if self.pivoted and last_first and core == 0 and in_leg == 1:
                total -= done * bonds[1] ** 2
            done *= out_leg
        return total

    def rebuild_multiply_adds(self, chi: int) -> int:
        """Returns the multiply-adds of contracting the cores into the dense matrix, from the first core on."""
        bonds = self.bonds(chi)
        sizes = [out_leg * in_leg for out_leg, in_leg in zip(self.out_legs, self.in_legs, strict=True)]
        return sum(prod(sizes[: core + 1]) * bonds[core] * bonds[core + 1] for core in range(1, len(sizes)))

    @cached_property
    def break_even_chi(self) -> int:
        """Largest χ that stores fewer entries than the dense matrix; 0 if even χ = 1 does not."""
        return self.largest_chi(self.dense_parameters - 1)

    def largest_chi(self, parameters: int) -> int:
        """Returns the largest χ that stores at most `parameters`, capped at full χ; 0 if even χ = 1 stores more."""
        low, high = 0, max(self.full_bonds)
        while low < high:
            middle = (low + high + 1) // 2
            if self.parameters(middle) <= parameters:
                low = middle
            else:
                high = middle - 1
        return low


@lru_cache(maxsize=4096)
def resolve(topology: str, out_features: int, in_features: int) -> Legs:
    """Returns the legs of a named topology for a matrix of shape (out_features, in_features).

    "lowrank" gives legs (out, 1) × (1, in); "mpoN" gives N legs per side, as equal as the divisors allow;
    "mpo:9.64x24.24" names the output legs and the input legs. The prefix "pivoted-" removes the redundant gauge
    parameters.

    Raises:
        ValueError: the name has none of these forms, or the products of named legs are not the shape.
    """
    form = topology.removeprefix("pivoted-")
    pivoted = form != topology
    if form == "lowrank":
        return Legs((out_features, 1), (1, in_features), pivoted)
    if match := re.fullmatch(r"mpo([2-9])", form):
        cores = int(match.group(1))
        return Legs(balanced(out_features, cores), balanced(in_features, cores), pivoted)
    match = re.fullmatch(r"mpo:(\d{1,6}(?:\.\d{1,6}){1,8})x(\d{1,6}(?:\.\d{1,6}){1,8})", form)
    if match is None:
        raise Refusal(
            f"topology must be lowrank, mpo2 … mpo9 or legs as in mpo:9.64x24.24, optionally with the prefix pivoted-, "
            f"got {topology!r}"
        )
    out_legs, in_legs = (tuple(map(int, side.split("."))) for side in match.groups())
    legs = Legs(out_legs, in_legs, pivoted)
    if (prod(legs.out_legs), prod(legs.in_legs)) != (out_features, in_features):
        raise Refusal(f"the products of the legs of {topology} must be {out_features} and {in_features}")
    return legs


def leg_name(legs: Legs) -> str:
    """Returns the topology name that `resolve` turns into `legs`."""
    sides = "x".join(".".join(map(str, side)) for side in (legs.out_legs, legs.in_legs))
    return "pivoted-" * legs.pivoted + f"mpo:{sides}"


@cache
def balanced(dimension: int, count: int) -> tuple[int, ...]:
    """Returns `count` factors of `dimension`, descending, with the least sum. A prime p gives (p, 1, …, 1)."""
    if count == 1:
        return (dimension,)
    best: tuple[int, ...] | None = None
    for first in range(1, dimension + 1):
        if dimension % first:
            continue
        candidate = tuple(sorted((first, *balanced(dimension // first, count - 1)), reverse=True))
        if best is None or sum(candidate) < sum(best):
            best = candidate
        if first**count > dimension:
            break
    assert best is not None
    return best
