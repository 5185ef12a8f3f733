"""Defines the sites of a prior: the choice for every matrix, the bonds that cut it, and what it costs alone.

Knows the fields of one site and their rules; `search.priors.format` knows the whole file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import prod
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from compression.numerics.legs import resolve
from compression.numerics.packed_size import FLOATING
from compression.refusal import Refusal
from compression.schedule import METRICS, SPARSE, Choice
from compression.sites import Cut

__all__ = [
    "Count",
    "Digest",
    "Digests",
    "Name",
    "Part",
    "Positive",
    "PriorBond",
    "PriorSite",
    "Sensitivity",
    "WidthSensitivity",
    "check_bonds",
]

_PATH = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*$"


def _harmless(text: str) -> str:
    """Refuse a name that is unsafe to print or, if someone builds a path from it, to use as a path."""
    if not text.isprintable() or ".." in text or "\\" in text or text.startswith(("/", "~")):
        raise Refusal("must be a printable name without '..', '\\' or a leading '/' or '~'")
    return text


Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_harmless)]
SitePath = Annotated[str, Field(max_length=500, pattern=_PATH)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1, le=2**48)]
# Lists are checked up to their first wrong element: a list of a million errors takes long to make and nobody reads it.
Positives = Annotated[tuple[Positive, ...], Field(fail_fast=True)]
Counts = Annotated[tuple[Count, ...], Field(fail_fast=True)]
Digests = Annotated[tuple[Digest, ...], Field(fail_fast=True)]
Source = Literal["predicted", "measured"]


class Part(BaseModel):
    """A part of a prior: its fields are strict, and no others are allowed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Sensitivity(Part):
    """KL to the dense model at several χ when only this site is compressed, in nats per token."""

    source: Source = Field(description="predicted: ½·tr(G E C Eᵀ) from the menu. measured: by `search.py profile`.")
    chi: Positives = Field(min_length=1, description="Bond dimensions, ascending.")
    kl: tuple[float, ...] = Field(min_length=1, fail_fast=True, description="KL at each χ, nats per token.")

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        _check_trace(self.chi, self.kl, "χ")
        return self


class WidthSensitivity(Part):
    """KL to the dense model at several widths when only this bond is cut and nothing is factored, in nats per token."""

    source: Source = Field(description="predicted: the exact cost of the elimination, from the menu.")
    width: Counts = Field(min_length=1, description="Numbers of groups that are kept, ascending.")
    kl: tuple[float, ...] = Field(min_length=1, fail_fast=True, description="KL at each width, nats per token.")

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        _check_trace(self.width, self.kl, "width")
        return self


def _check_trace(places: Sequence[int], kl: Sequence[float], what: str) -> None:
    if len(places) != len(kl):
        raise Refusal(f"a trace needs one KL for each {what}, got {len(kl)} for {len(places)}")
    if list(places) != sorted(set(places)):
        raise Refusal(f"the {what} of a trace must ascend")


class PriorBond(Part):
    """How a bond between matrices cuts this matrix: hidden units of an MLP, or key/value groups of attention heads."""

    name: SitePath = Field(description="Qualified name of the module around the matrices that the bond joins.")
    side: Literal["out", "in"] = Field(
        description="out: the matrix writes the bond, which cuts its outputs. in: the matrix reads it with its inputs."
    )
    groups: Positive = Field(description="Full width: the number of groups, which divides that side of the matrix.")
    width: Count = Field(description="Number of groups that are kept, from 0 to `groups`.")
    sensitivity: WidthSensitivity | None = Field(
        None, description="Cost of the widths of this bond; only at the matrix that reads it."
    )

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.width > self.groups:
            raise Refusal(f"the width of {self.name} must be at most {self.groups}, its full width, got {self.width}")
        if self.sensitivity is None:
            return self
        if self.side == "out":
            raise Refusal(f"{self.name}: the sensitivity of a bond belongs to the matrix that reads it, with side 'in'")
        if self.sensitivity.width[-1] > self.groups:
            raise Refusal(f"{self.name}: the widths of a trace must be at most {self.groups}")
        return self

    def fits(self, cut: Cut) -> bool:
        """Whether a site of a model that is cut in this way has the same bond, whatever its width."""
        return (cut.bond, cut.of_rows, cut.groups) == (self.name, self.side == "out", self.groups)


class PriorSite(Part):
    """The choice for one matrix.

    `chi` and the legs are absent if it has no factors, `entries` if it is not pruned, and `bits` if it is not rounded.
    """

    name: SitePath = Field(description="Qualified name of the module in the model.")
    block: Annotated[int, Field(ge=0, lt=100_000)] = Field(description="Index of the block, from 0.")
    family: SitePath = Field(description="Kind of the matrix, such as q or down.")
    shape: tuple[Positive, Positive] = Field(description="Number of outputs and of inputs of the dense matrix.")
    bonds: tuple[PriorBond, ...] | None = Field(
        None,
        min_length=1,
        max_length=2,
        description="The bonds that cut this matrix; absent if none does. The fields below describe what they leave.",
    )
    topology: Annotated[str, Field(max_length=200)] = Field(
        description="dense (no factors), sparse (pruned), lowrank, mpoN, or explicit legs such as mpo:9.64x24.24; the "
        "prefix pivoted- means that the gauge freedom is removed."
    )
    chi: Positive | None = Field(None, description="Bond dimension.")
    entries: Positive | None = Field(None, description="Number of entries that are stored of a pruned matrix.")
    bits: Literal[8, 6, 5, 4, 3, 2] | None = Field(
        None, description="Bits of each stored number, if these are integers in groups that share a scale."
    )
    metric: Literal["plain", "input", "two-sided"] | None = Field(
        None, description="Norm in which the matrix was approximated, pruned or rounded."
    )
    out_legs: Positives | None = Field(None, description="How the outputs are split, one leg per core.")
    in_legs: Positives | None = Field(None, description="How the inputs are split, one leg per core.")
    dense_because: Name | None = Field(None, description="Why the matrix cannot be tensorized.")
    parameters: Count = Field(description="Number of entries that are stored; 0 if a bond of width 0 leaves none.")
    offset: float | None = Field(
        None,
        description="Natural logarithm of the factor on the predicted cost of this matrix at which the closed form "
        "chooses this χ; 0 where it does without a factor. Matrices that a bond joins share theirs.",
    )
    sensitivity: Sensitivity | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        rest = (self.chi, self.metric, self.out_legs, self.in_legs)
        self._check_cuts()
        if self.topology == "dense":
            metric = None if self.bits is None else self.metric
            if any(value is not None for value in (*rest, self.entries) if value is not metric):
                raise Refusal(f"{self.name} is dense and has no chi, metric, legs or entries")
            if self.bits is not None and (metric is None or self.bonds is not None or self.dense_because is not None):
                raise Refusal(f"{self.name} is rounded: it needs a metric, and no bonds or dense_because")
            return self
        if self.topology == SPARSE:
            self._check_pruned()
            return self
        if self.entries is not None or self.bits is not None:
            raise Refusal(
                f"{self.name} has topology {self.topology} and no entries or bits, which only a pruned or rounded "
                "matrix has"
            )
        if any(value is None for value in rest) or self.dense_because is not None:
            raise Refusal(f"{self.name} needs chi, metric, out_legs and in_legs, and no dense_because")
        if not prod(self.left):
            raise Refusal(
                f"{self.name} must have topology dense where a width of 0 leaves nothing, got {self.topology}"
            )
        legs = resolve(self.topology, *self.left)
        if (legs.out_legs, legs.in_legs) != (self.out_legs, self.in_legs):
            raise Refusal(
                f"{self.name}: the legs of {self.topology} are {legs.out_legs} and {legs.in_legs}, "
                f"got {self.out_legs} and {self.in_legs}"
            )
        return self

    def _check_pruned(self) -> None:
        others = (self.chi, self.out_legs, self.in_legs, self.bonds, self.dense_because)
        if self.entries is None or self.metric is None or any(value is not None for value in others):
            raise Refusal(
                f"{self.name} is pruned: it needs entries and metric, and no chi, legs, bonds or dense_because"
            )
        if self.entries > self.dense_parameters:
            raise Refusal(f"{self.name}: entries must be at most {self.dense_parameters}, got {self.entries}")

    def _check_cuts(self) -> None:
        bonds = self.bonds or ()
        if bonds and self.dense_because is not None:
            raise Refusal(f"{self.name} has a dense_because, so no bond can cut it, but has bonds")
        if len({bond.side for bond in bonds}) < len(bonds):
            raise Refusal(f"{self.name} can have one bond on each side, got two with side {bonds[0].side!r}")
        for bond in bonds:
            length = self.shape[bond.side == "in"]
            if length % bond.groups:
                side = "inputs" if bond.side == "in" else "outputs"
                raise Refusal(
                    f"{self.name}: the groups of {bond.name} must divide the {length} {side}, got {bond.groups}"
                )

    @property
    def choice(self) -> Choice:
        """The choice for this site."""
        assert self.metric is None or self.metric in METRICS
        return Choice(self.topology, self.chi or self.entries or 0, self.metric or "none", self.widths, self.bits or 0)

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of the bonds that cut this site; empty if none does."""
        return tuple(bond.width for bond in self.bonds or ())

    @property
    def left(self) -> tuple[int, int]:
        """Outputs and inputs that the bonds leave."""
        sides = list(self.shape)
        for bond in self.bonds or ():
            sides[bond.side == "in"] = sides[bond.side == "in"] // bond.groups * bond.width
        return sides[0], sides[1]

    @property
    def largest_chi(self) -> int:
        """The largest χ that saves parameters; 0 if none does or the site has no factors."""
        return 0 if self.chi is None else resolve(self.topology, *self.left).break_even_chi

    @property
    def relative_chi(self) -> float:
        """χ divided by the χ at which the topology is exact, in (0, 1]; 1 without factors."""
        if self.chi is None:
            return 1.0
        return min(1.0, self.chi / max(resolve(self.topology, *self.left).full_bonds))

    @property
    def relative_width(self) -> float:
        """Fraction of the matrix that its bonds leave, in [0, 1]; 1 if none cuts it."""
        return prod((bond.width / bond.groups for bond in self.bonds or ()), start=1.0)

    @property
    def relative_density(self) -> float:
        """Fraction of its entries that a pruned matrix stores, in (0, 1]; 1 if it is not pruned."""
        return 1.0 if self.entries is None else self.entries / self.dense_parameters

    @property
    def relative_bits(self) -> float:
        """Bits of a stored number, relative to 16, in (0, 1]; 1 if the matrix is not rounded."""
        return (self.bits or FLOATING) / FLOATING

    @property
    def dense_parameters(self) -> int:
        """Number of entries of the dense matrix."""
        return prod(self.shape)

    @property
    def stored(self) -> int:
        """Number of entries that the choice stores; `parameters` must equal it."""
        if self.chi is None:
            return self.entries or prod(self.left)
        return resolve(self.topology, *self.left).parameters(self.chi)


def check_bonds(sites: Iterable[PriorSite]) -> None:
    """Refuse sites that disagree about a bond.

    Raises:
        ValueError: the sites of a bond name different widths or groups or lie in different blocks, not exactly one of
            them reads it, or none writes it.
    """
    inside: dict[str, list[tuple[PriorSite, PriorBond]]] = defaultdict(list)
    for site in sites:
        for bond in site.bonds or ():
            inside[bond.name].append((site, bond))
    for name, of in inside.items():
        first, known = of[0]
        for site, bond in of:
            for field, one, other in (
                ("groups", known.groups, bond.groups),
                ("width", known.width, bond.width),
                ("block", first.block, site.block),
            ):
                if one != other:
                    raise Refusal(
                        f"all sites of the bond {name} must have the same {field}, but {first.name} has {one} and "
                        f"{site.name} has {other}"
                    )
        readers = [site.name for site, bond in of if bond.side == "in"]
        if len(readers) != 1 or len(readers) == len(of):
            raise Refusal(
                f"one site must read the bond {name} with side 'in' and others must write it with side 'out', got "
                f"{len(readers)} that read and {len(of) - len(readers)} that write"
            )
