"""Converts priors of earlier format versions to the current one, and refuses later versions.

Takes and returns plain values. Unknown fields stay, so that the reader can refuse them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compression.refusal import Refusal
from compression.storage.strict_json import shown

__all__ = ["FORMAT", "VERSION", "score_entry", "to_current"]

FORMAT, VERSION = "chisel-prior", 5
_QUANTILE = 1.96  # 0.975 quantile of the normal distribution, for 95 % intervals
_SIZES = ("kept_fraction", "model_kept_fraction", "bytes_fraction", "parameters", "bytes", "multiply_adds")
_FIGURES = ("perplexity", "margin", "agreement")


def to_current(document: Mapping[str, object]) -> dict[str, Any]:
    """Convert a prior to the current version.

    Raises:
        ValueError: the format is another one, or the version is not a whole number or is newer than this program.
    """
    if document.get("format") != FORMAT:
        raise Refusal(f"format must be {FORMAT!r}, got {shown(document.get('format'))}")
    version = document.get("version")
    if type(version) is not int or version < 1:
        raise Refusal(f"version must be a whole number of at least 1, got {shown(version)}")
    if version > VERSION:
        raise Refusal(
            f"version must be at most {VERSION}, the newest that this program reads, got {version}; update Chisel"
        )
    current = dict(document)
    if version == 1:
        current = _from_version_1(current)
    # Version 2 had no bonds between matrices, 3 no pruned matrices and 4 no rounded ones; otherwise they are the same.
    return current | {"version": VERSION}


def score_entry(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a row of the final table, which has standard errors, to an entry of `scores`, which has intervals."""
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
    """Convert version 1, which had standard errors instead of intervals, the seed in the configuration only, and no
    offsets, no traces, and no whole-model fractions outside its table."""
    try:
        rows = document["scores"]
        document["scores"] = [score_entry(row) for row in rows]
        document["seeds"] = {"run": document["configuration"]["seed"]}
        for row in rows:
            if row["schedule"] == "searched":
                document["model_kept_fraction"] = row["model_kept_fraction"]
                document["bytes_fraction"] = row["bytes_fraction"]
    except (KeyError, TypeError, AttributeError) as error:
        raise Refusal(f"it is not a prior of version 1; check {error}") from None
    return document
