"""Compares the fingerprint of a stored search with that of the search that resumes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from search.config import absolute_name
from search.runtime.files import finite

__all__ = ["differences", "plain_values", "with_defaults", "with_later"]

_LATER = ("architecture",)
"""Entries that earlier versions did not write and that have no default: where they are absent, nothing is checked."""


def with_defaults(known: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A nested mapping whose missing entries are taken from `defaults`: single ones, and those in mappings of both.

    The fingerprint of an earlier version lacks the fields that were added later. It may hold the path of a model or
    proxy relative to the working directory, which is made absolute as in the configuration of today.
    """
    filled = dict(known)
    for key, default in defaults.items():
        if isinstance(default, Mapping) and isinstance(filled.get(key), Mapping):
            inner = filled[key]
            filled[key] = {**inner, **{name: value for name, value in default.items() if name not in inner}}
        elif not isinstance(default, Mapping):
            filled.setdefault(key, default)
    if isinstance(configuration := filled.get("configuration"), Mapping):
        paths = {name: configuration[name] for name in ("model", "proxy") if isinstance(configuration.get(name), str)}
        filled["configuration"] = {**configuration, **{name: absolute_name(path) for name, path in paths.items()}}
    return filled


def with_later(known: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The stored fingerprint `known`; entries that its version did not write yet are taken from `given`."""
    return {name: given[name] for name in _LATER if name in given} | dict(known)


def differences(known: Mapping[str, object], given: Mapping[str, object], prefix: str = "") -> list[str]:
    """The differences between two nested mappings, one phrase per leaf: "target_kept was 0.8, is 0.7"."""
    found: list[str] = []
    for key in sorted({*known, *given}):
        before, after, name = known.get(key, "absent"), given.get(key, "absent"), f"{prefix}{key}"
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{name}.")
        elif before != after:
            found.append(f"{name} was {_short(before)}, is {_short(after)}")
    return found


def plain_values(value: Mapping[str, object]) -> dict[str, Any]:
    """The mapping as JSON returns it: tuples become lists, and numbers that are not finite become None."""
    plain: dict[str, Any] = json.loads(json.dumps(finite(value), sort_keys=True))
    return plain


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
