"""Exceptions that more than one package raises."""

from __future__ import annotations

__all__ = ["DataUnavailable", "EvaluatorsLost"]


class DataUnavailable(RuntimeError):
    """Data cannot be had; the message is one sentence that says why, and the next step."""


class EvaluatorsLost(Exception):
    """The processes that score schedules cannot be kept alive."""
