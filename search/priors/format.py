"""Defines the file format of compression priors, version 5: its fields, strict reading, and writing for people.

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

from pydantic import Field, JsonValue, ValidationError, model_validator

from compression.refusal import Refusal
from compression.schedule import Schedule
from compression.storage.strict_json import LARGEST, bounded_text, parse, refuse_large, shown
from search.priors.sites import (
    Count,
    Digest,
    Digests,
    Name,
    Part,
    Positive,
    PriorBond,
    PriorSite,
    Sensitivity,
    WidthSensitivity,
    check_bonds,
)
from search.priors.versions import FORMAT, VERSION, to_current
from search.runtime.pretty_json import pretty_json

__all__ = [
    "LARGEST_FILE",
    "Estimate",
    "ModelIdentity",
    "Origin",
    "Prior",
    "PriorBond",
    "PriorData",
    "PriorScore",
    "PriorSite",
    "Sensitivity",
    "WidthSensitivity",
]

LARGEST_FILE = LARGEST
"""Bytes of the largest prior that is read. A model of 80 blocks with a site per head needs two thirds of this."""
_KEYS = 1000  # most keys of an object in a prior

Fraction = Annotated[float, Field(ge=0.0)]


class ModelIdentity(Part):
    """The model that a prior was made for."""

    id: Name = Field(description="Hub id, or name of the model's folder.")
    digest: Digest = Field(description="sha256 over names, shapes, dtypes and bytes of the parameters as loaded.")
    config_digest: Digest | None = Field(
        None, description="sha256 over the architecture's configuration, without file names, versions and dtypes."
    )
    license: Name = Field(description="Licence of the model's weights, or unknown.")
    parameters: Positive | None = Field(None, description="Parameters of the dense model, tied weights counted once.")
    bytes: Positive | None = Field(None, description="Bytes of those parameters in the dtype they were loaded in.")


class Estimate(Part):
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


class PriorScore(Part):
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
    multiply_adds: Count = Field(description="Multiply-adds per token over the sites.")
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


class PriorData(Part):
    """Digests of the data used for calibration, search and measurement."""

    calibration: Digest
    search_text: Digest
    heldout_text: Digest
    search_items: Digests
    report_items: Digests | None = None


class Origin(Part):
    """The prior from which this one was made."""

    model: ModelIdentity
    schedule_digest: Digest
    notes: tuple[Annotated[str, Field(max_length=1000)], ...] = Field(
        fail_fast=True, description="How the prior was transferred to this model."
    )


class Prior(Part):
    """A compression prior."""

    format: Literal["chisel-prior"]
    version: Literal[5]
    model: ModelIdentity
    target_kept: Annotated[float, Field(gt=0, le=1)] = Field(
        description="Target of the kept fraction; in a run by bytes, of the bytes of the sites."
    )
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
    def has_widths(self) -> bool:
        """Whether the schedule cuts a bond."""
        return any(site.bonds for site in self.sites)

    @property
    def is_small(self) -> bool:
        """Whether the schedule was made for few bytes, by the form small: its matrices may be pruned or rounded."""
        return self.configuration.get("form") == "small" or any(site.entries or site.bits for site in self.sites)

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
        """Check what a schema cannot: unique names, χ that save parameters, bonds that agree, sums and a digest."""
        for number, site in enumerate(self.sites):
            if site.chi is not None and site.chi > site.largest_chi and not clamp:
                raise Refusal(
                    f"sites.{number}.chi of {site.name} must be at most {site.largest_chi}, above which "
                    f"{site.topology} saves nothing, got {site.chi}; search.py apply --clamp lowers it"
                )
        schedule = self.schedule  # raises Refusal if a name is repeated
        check_bonds(self.sites)
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
    """Return the site at the largest χ that saves parameters; without factors if there is none."""
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
