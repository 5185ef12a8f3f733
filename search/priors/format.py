"""Defines the file format of compression priors, version 2: its fields, strict reading, and writing for people.

A prior is a JSON file that holds a winning schedule, its scores and its provenance, so that others can apply it. Knows
no models and no runs; `search.priors.build` makes priors, `search.priors.versions` converts older files, and
`search.priors.transfer` applies a prior to a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from compression.numerics.legs import resolve
from compression.refusal import Refusal
from compression.schedule import DENSE, METRICS, Choice, Schedule
from compression.storage.strict_json import LARGEST, bounded_text, parse, refuse_large, shown
from search.priors.versions import FORMAT, VERSION, to_current
from search.runtime.pretty_json import pretty_json

__all__ = [
    "LARGEST_FILE",
    "Estimate",
    "ModelIdentity",
    "Origin",
    "Prior",
    "PriorData",
    "PriorScore",
    "PriorSite",
    "Sensitivity",
]

LARGEST_FILE = LARGEST
"""Bytes of the largest prior that is read. A model of 80 blocks with a site per head needs two thirds of this."""
_KEYS = 1000  # most keys of an object in a prior
_PATH = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*$"


def _harmless(text: str) -> str:
    """Refuse a name that is unsafe to print or, if someone builds a path from it, to use as a path."""
    if not text.isprintable() or ".." in text or "\\" in text or text.startswith(("/", "~")):
        raise Refusal("must be a printable name without '..', '\\' or a leading '/' or '~'")
    return text


Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_harmless)]
SitePath = Annotated[str, Field(max_length=500, pattern=_PATH)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Fraction = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1, le=2**48)]
# Lists are checked up to their first wrong element: a list of a million errors takes long to make and nobody reads it.
Positives = Annotated[tuple[Positive, ...], Field(fail_fast=True)]
Digests = Annotated[tuple[Digest, ...], Field(fail_fast=True)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelIdentity(_Part):
    """The model that a prior was made for."""

    id: Name = Field(description="Hub id, or name of the model's folder.")
    digest: Digest = Field(description="sha256 over names, shapes, dtypes and bytes of the parameters as loaded.")
    config_digest: Digest | None = Field(
        None, description="sha256 over the architecture's configuration, without file names, versions and dtypes."
    )
    license: Name = Field(description="Licence of the model's weights, or unknown.")
    parameters: Positive | None = Field(None, description="Parameters of the dense model, tied weights counted once.")
    bytes: Positive | None = Field(None, description="Bytes of those parameters in the dtype they were loaded in.")


class Sensitivity(_Part):
    """KL to the dense model at several χ when only this site is compressed, in nats per token."""

    source: Literal["predicted", "measured"] = Field(
        description="predicted: ½·tr(G E C Eᵀ) from the menu. measured: by `search.py profile`."
    )
    chi: Positives = Field(min_length=1, description="Bond dimensions, ascending.")
    kl: tuple[float, ...] = Field(min_length=1, fail_fast=True, description="KL at each χ, nats per token.")

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if len(self.chi) != len(self.kl):
            raise Refusal(f"a trace needs one KL for each χ, got {len(self.kl)} for {len(self.chi)}")
        if list(self.chi) != sorted(set(self.chi)):
            raise Refusal("the χ of a trace must ascend")
        return self


class PriorSite(_Part):
    """The choice for one matrix. `chi`, `metric` and the legs are absent if the matrix stays dense."""

    name: SitePath = Field(description="Qualified name of the module in the model.")
    block: Annotated[int, Field(ge=0, lt=100_000)] = Field(description="Index of the block, from 0.")
    family: SitePath = Field(description="Kind of the matrix, such as q or down.")
    shape: tuple[Positive, Positive] = Field(description="Number of outputs and of inputs.")
    topology: Annotated[str, Field(max_length=200)] = Field(
        description="dense, lowrank, mpoN, or explicit legs such as mpo:9.64x24.24; the prefix pivoted- means that the "
        "gauge freedom is removed."
    )
    chi: Positive | None = Field(None, description="Bond dimension.")
    metric: Literal["plain", "input", "two-sided"] | None = Field(
        None, description="Norm in which the matrix was approximated."
    )
    out_legs: Positives | None = Field(None, description="How the outputs are split, one leg per core.")
    in_legs: Positives | None = Field(None, description="How the inputs are split, one leg per core.")
    dense_because: Name | None = Field(None, description="Why the matrix cannot be tensorized.")
    parameters: Positive = Field(description="Number of entries that are stored.")
    offset: float | None = Field(
        None,
        description="Natural logarithm of the factor on the predicted cost of this matrix at which the closed form "
        "chooses this χ; 0 where it does without a factor.",
    )
    sensitivity: Sensitivity | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        rest = (self.chi, self.metric, self.out_legs, self.in_legs)
        if self.topology == "dense":
            if any(value is not None for value in rest):
                raise Refusal(f"{self.name} is dense and has no chi, metric or legs")
            return self
        if any(value is None for value in rest) or self.dense_because is not None:
            raise Refusal(f"{self.name} needs chi, metric, out_legs and in_legs, and no dense_because")
        legs = resolve(self.topology, *self.shape)
        if (legs.out_legs, legs.in_legs) != (self.out_legs, self.in_legs):
            raise Refusal(
                f"{self.name}: the legs of {self.topology} are {legs.out_legs} and {legs.in_legs}, "
                f"got {self.out_legs} and {self.in_legs}"
            )
        return self

    @property
    def choice(self) -> Choice:
        """The choice for this site."""
        if self.chi is None:
            return DENSE
        assert self.metric in METRICS
        return Choice(self.topology, self.chi, self.metric)

    @property
    def largest_chi(self) -> int:
        """The largest χ that saves parameters; 0 if none does or the site is dense."""
        return 0 if self.chi is None else resolve(self.topology, *self.shape).break_even_chi

    @property
    def relative_chi(self) -> float:
        """χ divided by the χ at which the topology is exact, in (0, 1]; 1 for dense."""
        if self.chi is None:
            return 1.0
        return min(1.0, self.chi / max(resolve(self.topology, *self.shape).full_bonds))

    @property
    def dense_parameters(self) -> int:
        """Number of entries of the dense matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def stored(self) -> int:
        """Number of entries that the topology stores at this χ; `parameters` must equal it."""
        return self.dense_parameters if self.chi is None else resolve(self.topology, *self.shape).parameters(self.chi)


class Estimate(_Part):
    """A value with its 95 % interval; the interval is absent if there is only one sample."""

    value: float
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _is_an_interval(self) -> Self:
        if (self.low is None) != (self.high is None):
            raise Refusal("an interval needs both low and high, or neither")
        if self.low is not None and self.high is not None and not self.low <= self.value <= self.high:
            raise Refusal(f"an interval must hold its value, got {self.value} in {self.low} to {self.high}")
        return self


class PriorScore(_Part):
    """One row of the table that the prior was published with. Values that could not be measured are absent."""

    schedule: Name
    state: Name
    kept_fraction: Fraction = Field(description="Parameters after / before over the sites.")
    model_kept_fraction: Fraction = Field(
        description="Parameters after / before over the whole model, tied weights counted once."
    )
    bytes_fraction: Fraction = Field(description="Bytes after / before over the whole model.")
    parameters: Positive
    bytes: Positive
    multiply_adds: Positive = Field(description="Multiply-adds per token over the sites.")
    kl: Estimate | None = Field(None, description="KL to the dense model, nats per token.")
    perplexity: Annotated[float, Field(ge=0)] | None = None
    accuracy: Estimate | None = None
    expected_accuracy: Estimate | None = Field(None, description="Mean probability of the correct answer.")
    margin: float | None = Field(
        None, description="Log-probability of the correct answer minus that of the best other answer."
    )
    agreement: float | None = Field(
        None, description="Fraction of positions where the likeliest token equals that of the dense model."
    )
    items: Count
    tokens: Count


class PriorData(_Part):
    """Digests of the data used for calibration, search and measurement."""

    calibration: Digest
    search_text: Digest
    heldout_text: Digest
    search_items: Digests
    report_items: Digests | None = None


class Origin(_Part):
    """The prior from which this one was made."""

    model: ModelIdentity
    schedule_digest: Digest
    notes: tuple[Annotated[str, Field(max_length=1000)], ...] = Field(
        fail_fast=True, description="How the prior was transferred to this model."
    )


class Prior(_Part):
    """A compression prior."""

    format: Literal["chisel-prior"]
    version: Literal[2]
    model: ModelIdentity
    target_kept: Annotated[float, Field(gt=0, le=1)] = Field(description="Target of the kept fraction.")
    kept_fraction: Fraction = Field(description="Parameters after / before over the sites.")
    model_kept_fraction: Fraction | None = Field(
        None, description="Parameters after / before over the whole model, tied weights counted once."
    )
    bytes_fraction: Fraction | None = Field(None, description="Bytes after / before over the whole model.")
    schedule_digest: Digest | None = Field(
        None,
        description="Digest of the schedule; null in a prior edited by hand, whose scores then belong to no schedule.",
    )
    origin: Origin | None = Field(
        None, description="Prior that the schedule comes from, if it does not come from a search on this model."
    )
    seeds: Mapping[Name, Count] = Field(description="Seed of every random generator of the run.")
    sites: tuple[PriorSite, ...] = Field(min_length=1, fail_fast=True)
    scores: tuple[PriorScore, ...] = Field(fail_fast=True)
    data: PriorData
    configuration: Mapping[str, JsonValue] = Field(description="Configuration of the run, by field.")
    environment: Mapping[str, JsonValue] = Field(description="Date, command, commit, machine and versions.")

    @classmethod
    def read(cls, path: Path, clamp: bool = False) -> Prior:
        """Read a prior of this version or an earlier one from a file.

        Args:
            clamp: lower each χ to the largest one that saves parameters; otherwise a larger χ is refused.

        Raises:
            ValueError: the prior is refused; one line names file, field, rule and value.
        """
        text = bounded_text(path, "the prior", LARGEST_FILE)
        try:
            return cls.parse(text, clamp)
        except ValueError as error:
            raise Refusal(f"cannot use the prior {path}: {error}") from None

    @classmethod
    def parse(cls, text: str, clamp: bool = False) -> Prior:
        """Read a prior from the text of a file, as `read` does."""
        refuse_large(text, LARGEST_FILE)
        document = parse(text, _KEYS)
        if not isinstance(document, dict):
            raise Refusal(f"expected a JSON object, got {type(document).__name__}")
        current = json.dumps(to_current(document))
        del document  # or a large one would be in memory three times
        return cls._parsed(current)._checked(clamp)

    @classmethod
    def of(cls, document: Mapping[str, object]) -> Prior:
        """Return the prior with these fields, as JSON values.

        Raises:
            Refusal: one line that names field, rule and value.
        """
        return cls._parsed(json.dumps(document))

    @classmethod
    def _parsed(cls, text: str) -> Prior:
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise Refusal(_one_line(error)) from None

    @property
    def schedule(self) -> Schedule:
        """The schedule of all sites."""
        return Schedule(tuple((site.name, site.choice) for site in self.sites))

    @property
    def blocks(self) -> int:
        """Number of blocks of the model that the prior was made for."""
        return 1 + max(site.block for site in self.sites)

    @property
    def was_repaired(self) -> bool:
        """Whether the run kept its repair; its table then has the row "repaired"."""
        return any(score.schedule == "repaired" for score in self.scores)

    def to_json(self) -> str:
        """Return the file content: keys in the order of the schema, no absent values, short lists on one line."""
        return pretty_json(self.model_dump(mode="json", exclude_none=True)) + "\n"

    @classmethod
    def published_schema(cls) -> str:
        """Return the JSON Schema of the format as text; docs/prior.schema.json publishes it."""
        own = cls.model_json_schema()
        head = {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": f"{FORMAT}, version {VERSION}",
            "description": "Generated from search/priors/format.py by `python search.py prior schema`.",
        }
        return json.dumps(head | {key: value for key, value in own.items() if key not in head}, indent=2) + "\n"

    def _checked(self, clamp: bool) -> Prior:
        """Check what a schema cannot: unique names, χ that save parameters, sums and a digest that match the sites."""
        for number, site in enumerate(self.sites):
            if site.chi is not None and site.chi > site.largest_chi and not clamp:
                raise Refusal(
                    f"sites.{number}.chi of {site.name} must be at most {site.largest_chi}, above which "
                    f"{site.topology} saves nothing, got {site.chi}; search.py apply --clamp lowers it"
                )
        schedule = self.schedule  # raises Refusal if a name is repeated
        if self.schedule_digest not in (None, schedule.digest):
            raise Refusal(
                f"schedule_digest must be that of the sites, {schedule.digest[:12]}…, got {self.schedule_digest}; "
                "set it to null in a prior edited by hand"
            )
        for number, site in enumerate(self.sites):
            if site.parameters != site.stored:
                raise Refusal(f"sites.{number}.parameters must be {site.stored}, got {site.parameters}")
        kept = _kept(self.sites)
        if abs(kept - self.kept_fraction) > 1e-9:
            raise Refusal(f"kept_fraction must be that of the sites, {kept}, got {self.kept_fraction}")
        return self._clamped() if clamp else self

    def _clamped(self) -> Prior:
        high = [site.chi is not None and site.chi > site.largest_chi for site in self.sites]
        if not any(high):
            return self
        sites = tuple(_lowered(site) if over else site for site, over in zip(self.sites, high, strict=True))
        # Scores and whole-model fractions belong to the schedule before the χ were lowered.
        gone: dict[str, Any] = dict(model_kept_fraction=None, bytes_fraction=None, schedule_digest=None, scores=())
        return self.model_copy(update={**gone, "sites": sites, "kept_fraction": _kept(sites)})


def _lowered(site: PriorSite) -> PriorSite:
    """Return the site at the largest χ that saves parameters; dense if there is none."""
    if site.largest_chi == 0:
        changed: dict[str, Any] = dict(topology="dense", chi=None, metric=None, out_legs=None, in_legs=None)
    else:
        changed = dict(chi=site.largest_chi)
    lowered = site.model_copy(update={**changed, "offset": None})
    return lowered.model_copy(update={"parameters": lowered.stored})


def _kept(sites: Sequence[PriorSite]) -> float:
    return sum(site.parameters for site in sites) / sum(site.dense_parameters for site in sites)


def _one_line(error: ValidationError) -> str:
    """Return the first error of pydantic as one line: field, rule, value."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    rule = re.sub(r"^(Value error, |Assertion failed, )", "", first["msg"])
    rule = re.sub(r"^(Input|String|Value) should (be|have|match)", r"must \2", rule)
    if first["type"] == "extra_forbidden":
        return f"{where} is not a field of version {VERSION}"
    if first["type"] == "missing":
        return f"{where} is missing"
    if first["type"] == "value_error" and isinstance(first["input"], dict):
        return f"{where}: {rule}"
    return f"{where}: {rule}, got {shown(first['input'])}"
