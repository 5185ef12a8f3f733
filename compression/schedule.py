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

from compression.refusal import Refusal

__all__ = ["DENSE", "METRICS", "Choice", "Schedule"]

METRICS = ("none", "plain", "input", "two-sided")


@dataclass(frozen=True)
class Choice:
    """States the form that one site takes.

    Attributes:
        topology: "dense", or a topology name such as "lowrank", "pivoted-lowrank" or "mpoN" for N balanced legs (see
            `compression.numerics.legs.resolve`).
        chi: bond dimension, at least 1; 0 for dense.
        metric: the norm in which the cores are fitted: "plain" (Frobenius), "input" (input second moment C) or
            "two-sided" (C and the output-gradient second moment G); "none" for dense.
    """

    topology: str
    chi: int
    metric: str

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise Refusal(f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}")
        if type(self.chi) is not int or (self.chi != 0 if self.topology == "dense" else self.chi < 1):
            raise Refusal(f"chi of {self.topology!r} must be an integer of at least 1 (0 for dense), got {self.chi!r}")

    @property
    def is_dense(self) -> bool:
        """Whether the site keeps its original matrix."""
        return self.topology == "dense"


DENSE = Choice("dense", 0, "none")


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

    def to_json(self) -> str:
        """Returns the canonical JSON: one list [name, topology, chi, metric] per site, without spaces."""
        rows = [[name, choice.topology, choice.chi, choice.metric] for name, choice in self.choices]
        return json.dumps(rows, separators=(",", ":"), ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Returns the schedule that `to_json` wrote. Raises ValueError for any other text."""
        rows = json.loads(text)
        if not isinstance(rows, list) or any(not isinstance(row, list) or len(row) != 4 for row in rows):
            raise Refusal("a schedule is a list of [name, topology, chi, metric] rows")
        return cls(tuple((str(name), Choice(topology, chi, metric)) for name, topology, chi, metric in rows))

    @classmethod
    def dense(cls, names: tuple[str, ...]) -> Schedule:
        """Returns the schedule that keeps every site dense."""
        return cls(tuple((name, DENSE) for name in names))
