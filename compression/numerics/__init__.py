"""Arrays in, arrays out: legs, cores, SVD, gauge, fits, whitening. Imports nothing else of the project."""

__all__: list[str] = []
