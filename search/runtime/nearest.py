"""The nearest valid name for a message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["nearest"]


def nearest(value: str, names: Iterable[str]) -> str:
    """The name most like `value`; ties go to the first in the alphabet."""
    return max(sorted(names), key=lambda name: difflib.SequenceMatcher(None, value.lower(), name.lower()).ratio())
