"""Create KV caches of transformers, name the argument that takes them, and reduce them to fewer positions."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers

__all__ = ["cache_argument", "keep_positions", "new_cache"]


def new_cache(model: Any) -> Any:
    """An empty KV cache; a forward pass appends to it in place."""
    return transformers.DynamicCache(config=model.config)


def cache_argument(model: Any) -> str:
    """Name of the argument in which a model takes its cache, and of the output that returns it.

    A model without attention, such as Mamba, has a name of its own and ignores the usual one without an error.
    """
    taken = inspect.signature(model.forward).parameters
    return "cache_params" if "cache_params" in taken else "past_key_values"


def keep_positions(cache: Any, kept: torch.Tensor) -> None:
    """Drop all positions of a cache except those with the indices `kept`, in place."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
