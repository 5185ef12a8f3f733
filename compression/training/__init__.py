"""Supports training of factors: losses, gates, trainable cores, replayed CUDA graphs."""

__all__: list[str] = []
