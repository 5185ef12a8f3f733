"""Versions of the prior's format: what an earlier one is called today, and a later one refused by name.

Plain values in, plain values out; what is not known is left in its place, for the reader to refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compression.refusal import Refusal

__all__ = ["FORMAT", "VERSION", "score_entry", "to_current"]

FORMAT, VERSION = "chisel-prior", 2
_QUANTILE = 1.96  # of the normal distribution, for intervals of 95 %
_SIZES = ("kept_fraction", "model_kept_fraction", "bytes_fraction", "parameters", "bytes", "multiply_adds")
_FIGURES = ("perplexity", "margin", "agreement")


def to_current(document: Mapping[str, object]) -> dict[str, Any]:
    """The same prior in the current version.

    Raises:
        ValueError: another format, or a version that is no whole number or newer than this program.
    """
    if document.get("format") != FORMAT:
        raise Refusal(f"format must be {FORMAT!r}, got {document.get('format')!r:.80}")
    version = document.get("version")
    if type(version) is not int or version < 1:
        raise Refusal(f"version must be a whole number of at least 1, got {version!r:.80}")
    if version > VERSION:
        raise Refusal(f"version must be at most {VERSION}, which this program reads, got {version}; update it")
    current = dict(document)
    return _from_version_1(current) if version == 1 else current


def score_entry(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the final table, with standard errors beside its figures, as an entry of `scores` with intervals."""
    entry: dict[str, Any] = {"schedule": row["schedule"], "state": row["state"]}
    entry |= {name: row[name] for name in _SIZES}
    for name in ("kl", "accuracy", "expected_accuracy"):
        entry[name] = _estimate(row.get(name), row.get(f"{name}_stderr"))
    entry |= {name: row.get(name) for name in _FIGURES}
    return entry | {"items": row["items"], "tokens": row["tokens"]}


def _estimate(value: float | None, error: float | None) -> dict[str, float] | None:
    if value is None:
        return None
    return {"value": value} | (
        {} if error is None else {"low": value - _QUANTILE * error, "high": value + _QUANTILE * error}
    )


def _from_version_1(document: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had standard errors in the place of intervals, the seed in the configuration only, and no offsets,
    traces or fractions of the whole model outside its table."""
    try:
        rows = document["scores"]
        document["scores"] = [score_entry(row) for row in rows]
        document["seeds"] = {"run": document["configuration"]["seed"]}
        for row in rows:
            if row["schedule"] == "searched":
                document["model_kept_fraction"] = row["model_kept_fraction"]
                document["bytes_fraction"] = row["bytes_fraction"]
    except (KeyError, TypeError, AttributeError) as error:
        raise Refusal(f"it is no prior of version 1, check {error}") from None
    return document | {"version": VERSION}
