"""`Refusal`: the exception for input that is refused, with the nearest valid name for its message.

Every package raises it for a value that a person can correct. Any other exception is a fault of this project. Knows
nothing of the values.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["Refusal", "nearest", "similarity"]


class Refusal(ValueError):
    """Input that is refused. Its message is one line: the rule, the offending value and the nearest valid choice."""


def nearest(value: str, names: Iterable[str]) -> str:
    """The name most similar to `value`; ties go to the first in the alphabet."""
    return max(sorted(names), key=lambda name: similarity(value, name))


def similarity(one: str, other: str) -> float:
    """How alike two names are without regard to case: difflib's ratio, from 0 to 1 for equal ones."""
    return difflib.SequenceMatcher(None, one.lower(), other.lower()).ratio()
