"""Create KV caches of transformers and reduce them to fewer positions."""

from __future__ import annotations

from typing import Any

import torch
import transformers

__all__ = ["keep_positions", "new_cache"]


def new_cache(model: Any) -> Any:
    """An empty KV cache; a forward pass appends to it in place."""
    return transformers.DynamicCache(config=model.config)


def keep_positions(cache: Any, kept: torch.Tensor) -> None:
    """Drop all positions of a cache except those with the indices `kept`, in place."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
