"""Tensors on disk: the factor cache and safe tensor files."""

__all__: list[str] = []
