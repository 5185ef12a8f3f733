"""Defines exceptions that more than one package raises."""

from __future__ import annotations

__all__ = ["DataUnavailable", "EvaluatorsLost"]


class DataUnavailable(RuntimeError):
    """Data cannot be obtained; the message is one sentence that gives the reason and the next step."""


class EvaluatorsLost(Exception):
    """The processes that score schedules cannot be kept alive."""
