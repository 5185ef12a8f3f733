"""The schemas of the files that reports and data frames are made of: what a run's own commands write into its folder.

prior.json is read here only as far as it is drawn; `search.priors.format` has its whole format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from compression.storage.strict_json import read_object
from search.reporting.frames import read_records
from search.runtime.schema import Amount, Cell, Figure, Line, Part, Size, Word, checked

__all__ = [
    "BenchmarkLine",
    "ContestFile",
    "HealingFile",
    "PriorFile",
    "SensitivityLine",
    "StageLine",
    "SummaryFile",
    "TrialLine",
    "document",
    "records",
]

_LARGEST_FILE = 1 << 26  # bytes of a JSON file
_ABSENT = BeforeValidator(lambda value: None if value == {} else value)  # a run writes {} for what it did not measure


class _Row(Part):
    """A row of the final table."""

    schedule: Word
    parameters: Size
    kept_fraction: Figure | None = None
    kl: Figure | None = None
    kl_unseen: Figure | None = None
    perplexity: Figure | None = None
    perplexity_prose: Figure | None = None
    perplexity_exam: Figure | None = None
    accuracy: Figure | None = None
    accuracy_stderr: Figure | None = None
    expected_accuracy: Figure | None = None
    expected_accuracy_stderr: Figure | None = None
    items: Amount | None = None
    bytes: Amount | None = None
    prefill_ratio: Figure | None = None
    decode_ratio: Figure | None = None


class _Difference(Part):
    value: Figure
    standard_error: Figure
    relative: Figure | None = None
    sequences: Amount


class _Latency(Part):
    optimize: Word
    prefill_ratio: Figure
    decode_ratio: Figure | None = None  # an encoder does not decode
    prompt: Amount
    stored_bytes: Amount
    resident_bytes: Amount


class SummaryFile(Part):
    """summary.json."""

    model: Word | None = None
    agent: Word | None = None
    target_kept: Figure | None = None
    rows: list[_Row] = Field(default=[], max_length=1000)
    searched_against_lagrangian_kl: Annotated[_Difference | None, _ABSENT] = None
    latency: Annotated[_Latency | None, _ABSENT] = None
    environment: dict[str, Any] = Field(default={})


class _Bond(Part):
    name: Word
    side: Literal["out", "in"]
    groups: Size
    width: Amount


class _Site(Part):
    name: Word | None = None
    block: Amount = Field(le=100_000)
    family: Word
    shape: Annotated[list[Size], Field(min_length=2, max_length=2)]
    bonds: list[_Bond] | None = Field(default=None, min_length=1, max_length=2)
    parameters: Amount
    chi: Size | None = None
    entries: Size | None = None
    topology: Word | None = None


class PriorFile(Part):
    """The part of prior.json that is drawn."""

    sites: list[_Site] = Field(default=[], max_length=200_000)
    configuration: dict[str, Any] = Field(default={})


class _Look(Part):
    tokens: Amount
    kl: Figure | None = None


class HealingFile(Part):
    """healing.json."""

    looks: list[_Look] = Field(max_length=1_000_000)
    outlook: Word | None = None


class _Mark(Part):
    evaluations: Amount
    digest: Word


class _Entry(Part):
    agent: Word
    seed: Amount
    marks: list[_Mark]


class _Heldout(Part):
    kl: Figure | None = None


class ContestFile(Part):
    """contest.json."""

    entries: list[_Entry]
    heldout: dict[str, _Heldout]
    closed_form: Word


class TrialLine(Line):
    """A line of trials.csv."""

    trial: Word | None = None
    kl: Cell = None
    kl_control: Cell = None
    parameters: Cell = None


class BenchmarkLine(Line):
    """A line of benchmarks.csv."""

    model: Word
    task: Word
    metric: Word
    state: Word
    n: Amount
    value: Cell = None
    stderr: Cell = None


class SensitivityLine(Line):
    """A line of sensitivity.csv."""

    block: Amount
    family: Word
    state: Word
    kl: Cell = None


class StageLine(Line):
    """A line of stages.csv."""

    stage: Word
    seconds: Cell = None


def document(schema: type[Part], path: Path, what: str) -> Mapping[str, Any]:
    """Return the content of a JSON file that fits its schema; fields that it does not have are absent.

    Args:
        what: the kind of file, for messages, such as "the summary".

    Raises:
        Refusal: the file is not readable, or `search.runtime.schema.checked` rejects it.
    """
    read = read_object(path, what, _LARGEST_FILE)
    found: Part = checked(schema, read, path)
    content: Mapping[str, Any] = _in_order(found.model_dump(exclude_unset=True), read)
    return content


def _in_order(found: Any, read: Any) -> Any:
    """The same content with the keys of every object in the order in which they were read."""
    if isinstance(found, dict) and isinstance(read, dict):
        return {key: _in_order(found[key], value) for key, value in read.items() if key in found}
    if isinstance(found, list | tuple) and isinstance(read, list) and len(found) == len(read):
        return [_in_order(*pair) for pair in zip(found, read, strict=True)]
    return found


def records(schema: type[Part], path: Path) -> Sequence[Mapping[str, Any]]:
    """Return the lines of a CSV file that fit their schema, with numbers as numbers; none if there is no such file.

    Raises:
        Refusal: as `search.reporting.frames.read_records` and `search.runtime.schema.checked`.
    """
    rows: Sequence[Part] = checked(list[schema], read_records(path), path)  # type: ignore[valid-type]
    return [row.model_dump(exclude_unset=True) for row in rows]
