"""Key-value caches of transformers: new ones, and cut back to fewer positions."""

from __future__ import annotations

from typing import Any

import torch
import transformers

__all__ = ["keep_positions", "new_cache"]


def new_cache(model: Any) -> Any:
    """An empty cache of keys and values for one row; a forward pass appends to it in place."""
    return transformers.DynamicCache(config=model.config)


def keep_positions(cache: Any, kept: torch.Tensor) -> None:
    """Drop everything from a cache but these positions, in place."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
