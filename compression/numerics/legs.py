"""Legs: how the dimensions of a matrix are split for an MPO, and what a topology name means for a shape.

Integers in, integers out. Every topology is an MPO: `lowrank` is the two-core one whose left core has all output legs
and whose right core has all input legs, so its χ is the matrix rank. A pivoted topology represents the same matrices
with χ² parameters less a bond (see `compression.numerics.gauge`); at full χ it has exactly the entries of the dense
matrix.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod

from compression.refusal import Refusal

__all__ = ["Legs", "balanced", "leg_name", "resolve"]


@dataclass(frozen=True)
class Legs:
    """out = product of `out_legs`, in = product of `in_legs`; both tuples have one entry per core.

    Attributes:
        pivoted: whether the cores are stored without their gauge freedom.
    """

    out_legs: tuple[int, ...]
    in_legs: tuple[int, ...]
    pivoted: bool = False

    def __post_init__(self) -> None:
        if len(self.out_legs) != len(self.in_legs) or len(self.out_legs) < 2:
            raise Refusal(f"legs need one output and one input leg per core, two cores or more, got {self}")
        if min(self.out_legs + self.in_legs) < 1:
            raise Refusal(f"a leg is a positive integer, got {self}")

    @cached_property
    def full_bonds(self) -> tuple[int, ...]:
        """Bond dimensions at which any matrix of this shape is represented exactly."""
        sizes = [out_leg * in_leg for out_leg, in_leg in zip(self.out_legs, self.in_legs, strict=True)]
        return tuple(min(prod(sizes[:cut]), prod(sizes[cut:])) for cut in range(1, len(sizes)))

    @property
    def dense_parameters(self) -> int:
        """Entries of the matrix."""
        return prod(self.out_legs) * prod(self.in_legs)

    def bonds(self, chi: int) -> tuple[int, ...]:
        """Bond dimensions under the cap χ, with 1 at both ends: min(χ, full) for every inner bond."""
        return (1, *(min(chi, full) for full in self.full_bonds), 1)

    def parameters(self, chi: int) -> int:
        """Entries stored at bond dimension χ: of all cores, less the identity in every core but the last if pivoted."""
        bonds = self.bonds(chi)
        cores = zip(bonds[:-1], self.out_legs, self.in_legs, bonds[1:], strict=True)
        entries = sum(left * out_leg * in_leg * right for left, out_leg, in_leg, right in cores)
        return entries - self.pivoted * sum(bond * bond for bond in bonds[1:-1])

    def index_entries(self, chi: int) -> int:
        """Integers stored beside the parameters: the places of the identities' rows; 0 unless pivoted."""
        return sum(self.bonds(chi)[1:-1]) if self.pivoted else 0

    def multiply_adds(self, chi: int) -> int:
        """Multiply-adds per token of contracting the cores with an activation, from the cheaper end."""
        return min(self.multiply_adds_from(chi, last_first) for last_first in (False, True))

    def multiply_adds_from(self, chi: int, last_first: bool) -> int:
        """The same from the first core on, or from the last one back.

        The identity in a pivoted first core without an input leg, as `lowrank` has, is a copy and costs nothing when
        that core comes last.
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
        """Multiply-adds of contracting the cores into the dense matrix, first core first."""
        bonds = self.bonds(chi)
        sizes = [out_leg * in_leg for out_leg, in_leg in zip(self.out_legs, self.in_legs, strict=True)]
        return sum(prod(sizes[: core + 1]) * bonds[core] * bonds[core + 1] for core in range(1, len(sizes)))

    @cached_property
    def break_even_chi(self) -> int:
        """Largest χ whose cores have fewer entries than the matrix; 0 if even χ = 1 has not."""
        return self.largest_chi(self.dense_parameters - 1)

    def largest_chi(self, parameters: int) -> int:
        """Largest χ, up to where it stops to matter, that stores at most `parameters`; 0 if even χ = 1 stores more."""
        low, high = 0, max(self.full_bonds)
        while low < high:
            middle = (low + high + 1) // 2
            if self.parameters(middle) <= parameters:
                low = middle
            else:
                high = middle - 1
        return low


def resolve(topology: str, out_features: int, in_features: int) -> Legs:
    """Legs of a named topology for a matrix of shape (out_features, in_features).

    "lowrank" gives legs (out, 1) × (1, in); "mpoN" gives N legs a side, as equal as the divisors allow;
    "mpo:9.64x24.24" names the output legs and the input legs. "pivoted-" before any of these drops the gauge freedom.

    Raises:
        ValueError: any other name, or named legs whose products are not the shape.
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
            f"topology must be lowrank, mpo2 … mpo9 or legs as in mpo:9.64x24.24, with or without pivoted- before it, "
            f"got {topology!r}"
        )
    out_legs, in_legs = (tuple(map(int, side.split("."))) for side in match.groups())
    legs = Legs(out_legs, in_legs, pivoted)
    if (prod(legs.out_legs), prod(legs.in_legs)) != (out_features, in_features):
        raise Refusal(f"the legs of {topology} do not make a matrix of {out_features} by {in_features}")
    return legs


def leg_name(legs: Legs) -> str:
    """The topology name that `resolve` turns into `legs`."""
    sides = "x".join(".".join(map(str, side)) for side in (legs.out_legs, legs.in_legs))
    return "pivoted-" * legs.pivoted + f"mpo:{sides}"


@cache
def balanced(dimension: int, count: int) -> tuple[int, ...]:
    """`count` factors of `dimension`, descending, with the smallest possible sum. A prime gives (p, 1, …, 1)."""
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
