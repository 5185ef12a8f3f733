"""Factors of weights, applying a schedule to a model, and repair."""

__all__: list[str] = []
