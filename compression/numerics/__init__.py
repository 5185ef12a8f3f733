"""Computes on arrays only: legs, cores, SVD, gauge, fits, whitening. Imports nothing else of the project but errors."""

__all__: list[str] = []
