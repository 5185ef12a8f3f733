"""Measures second moments and slopes in forward and backward passes, of a whole model or block by block."""

__all__: list[str] = []
