"""Stores tensors and files on disk: the factor cache, tensor files, strict JSON, and files written atomically."""

__all__: list[str] = []
