"""Defines `Refusal`, the exception for rejected input, and finds the nearest valid name to suggest in its message.

Every package raises it for a value that the user can correct. Any other exception is a bug in this project. Does not
know what the values mean.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["Refusal", "nearest", "similarity"]


class Refusal(ValueError):
    """Rejects an input. Its message is one line: the rule, the offending value and the nearest valid choice."""


def nearest(value: str, names: Iterable[str]) -> str:
    """Returns the name most similar to `value`; ties go to the alphabetically first."""
    return max(sorted(names), key=lambda name: similarity(value, name))


def similarity(one: str, other: str) -> float:
    """Returns difflib's similarity ratio of two names, ignoring case: 0 for nothing in common, 1 for equal names."""
    return difflib.SequenceMatcher(None, one.lower(), other.lower()).ratio()
