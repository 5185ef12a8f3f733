"""Defines schedules, which state for every site whether it stays dense or which topology and bond dimension it takes.

Schedules are immutable and have one canonical JSON form. The hash of that form identifies a schedule everywhere. Knows
site names; does not know models or tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from compression.numerics.packed_size import BITS
from compression.refusal import Refusal

__all__ = ["DENSE", "METRICS", "SPARSE", "Choice", "ExpertForm", "Form", "Joint", "Schedule"]

Form = Literal["any", "plain", "factors", "small"]
"""What the matrices of a model may become: "plain", smaller dense matrices, because bonds between matrices are cut;
"factors", decomposed each by itself; "any", both together; or "small", these, pruned and rounded, for the fewest
bytes."""
ExpertForm = Literal["single", "shared", "fused"]
"""How the experts of a mixture are compressed: "single", the matrices of each expert by themselves; "shared", those of
all experts of a layer as one matrix per role, whose factors share a basis; or "fused", not at all."""
SPARSE = "sparse"
"""Topology of a pruned matrix, which stores some of its entries and a bit for each that says which they are."""
METRICS = ("none", "plain", "input", "two-sided")


@dataclass(frozen=True)
class Choice:
    """States the form that one site takes.

    Attributes:
        topology: "dense", "sparse" (pruned), or a topology name such as "lowrank", "pivoted-lowrank" or "mpoN" for N
            balanced legs (see `compression.numerics.legs.resolve`).
        chi: bond dimension, at least 1; the number of entries that are stored for "sparse"; 0 for dense.
        metric: the norm in which the cores are fitted: "plain" (Frobenius), "input" (input second moment C) or
            "two-sided" (C and the output-gradient second moment G); "none" for dense.
        widths: the widths of the site's bonds to other matrices, see `compression.sites.Site.cuts`, which the topology
            then decomposes what is left of the matrix; empty if all have their full width, as for "sparse".
        bits: bits of each stored number if these are integers that share scales in groups, see
            `compression.numerics.group_integers`; 0 if they are floating-point numbers.
    """

    topology: str
    chi: int
    metric: str
    widths: tuple[int, ...] = ()
    bits: int = 0

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise Refusal(f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}")
        if type(self.chi) is not int or (self.chi != 0 if self.topology == "dense" else self.chi < 1):
            raise Refusal(f"chi of {self.topology!r} must be an integer of at least 1 (0 for dense), got {self.chi!r}")

        if any(type(width) is not int or width < 0 for width in self.widths):
            raise Refusal(f"widths must be integers of at least 0, got {list(self.widths)!r}")
        if (self.is_sparse or self.bits) and self.widths:
            what = "pruned" if self.is_sparse else "rounded"
            raise Refusal(f"a {what} matrix keeps all of its rows and columns, got widths {list(self.widths)!r}")
        if type(self.bits) is not int or self.bits not in (0, *BITS):
            raise Refusal(f"bits of a matrix must be one of {', '.join(map(str, BITS))}, or 0, got {self.bits!r}")
        if self.bits and self.is_factored:
            raise Refusal(f"only a matrix without factors can be rounded, got {self.topology!r} in {self.bits} bits")

    @property
    def is_dense(self) -> bool:
        """Whether the site keeps its original matrix."""
        return self.topology == "dense" and not self.widths and not self.bits

    @property
    def is_plain(self) -> bool:
        """Whether the site holds one matrix of floating-point numbers: the original one, or a smaller one."""
        return self.topology == "dense" and not self.bits

    @property
    def is_sparse(self) -> bool:
        """Whether the site holds a pruned matrix."""
        return self.topology == SPARSE

    @property
    def is_factored(self) -> bool:
        """Whether the site holds factors."""
        return self.topology not in ("dense", SPARSE)

    @property
    def keeps_entries(self) -> bool:
        """Whether the site holds entries of its matrix in fewer bytes: pruned, rounded, or both."""
        return self.is_sparse or bool(self.bits)


DENSE = Choice("dense", 0, "none")


@dataclass(frozen=True)
class Joint:
    """States the choices of several sites that are made together, in the order of the sites of a unit."""

    choices: tuple[Choice, ...]

    @property
    def is_dense(self) -> bool:
        """Whether every site keeps its original matrix."""
        return all(choice.is_dense for choice in self.choices)


@dataclass(frozen=True)
class Schedule:
    """Holds pairs (site name, choice), one for every site of a model, in discovery order."""

    choices: tuple[tuple[str, Choice], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.choices]
        if len(set(names)) != len(names):
            raise Refusal("a schedule must name every site once, but a name is repeated")

    def __iter__(self) -> Iterator[tuple[str, Choice]]:
        return iter(self.choices)

    def __getitem__(self, name: str) -> Choice:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> Mapping[str, Choice]:
        return dict(self.choices)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, 64 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def shard(self, repeat: int, shards: int) -> int:
        """Returns which of `shards` sets of data measurement number `repeat` of this schedule reads, from 0.

        The digest picks the set for repeat 0, and each further repeat reads the next set.
        """
        return (int(self.digest[:8], 16) + repeat) % shards

    def to_json(self) -> str:
        """Returns the canonical JSON without spaces: per site a list [name, topology, chi, metric], followed by its
        widths if it is cut, or by an empty list and its bits if it is rounded."""
        rows = [[name, choice.topology, choice.chi, choice.metric, *_more(choice)] for name, choice in self.choices]
        return json.dumps(rows, separators=(",", ":"), ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Returns the schedule that `to_json` wrote. Raises ValueError for any other text."""
        rows = json.loads(text)
        if not isinstance(rows, list) or any(not isinstance(row, list) or len(row) not in (4, 5, 6) for row in rows):
            raise Refusal("a schedule is a list of [name, topology, chi, metric] rows, with widths where cut, and bits")
        return cls(
            tuple(
                (str(name), Choice(topology, chi, metric, tuple(*more[:1]), *more[1:]))
                for name, topology, chi, metric, *more in rows
            )
        )

    @classmethod
    def dense(cls, names: tuple[str, ...]) -> Schedule:
        """Returns the schedule that keeps every site dense."""
        return cls(tuple((name, DENSE) for name in names))


def _more(choice: Choice) -> list[object]:
    """What the row of a choice has beyond four values."""
    return [choice.widths, choice.bits] if choice.bits else [choice.widths] if choice.widths else []
