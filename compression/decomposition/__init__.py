"""Decomposes weights into factors, applies schedules to a model, and repairs compressed sites."""

__all__: list[str] = []
