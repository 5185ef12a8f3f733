"""Reads which rows and columns of their dense matrix layers hold, and widens them to it again.

Knows torch modules only. A layer whose bond to other matrices was cut (see `compression.bonds`) stores the numbers of
the rows or columns that are left, `kept_rows` or `kept_columns` (int32), among its own tensors. They go wherever the
layer goes: into a file of weights, a quantized layer, a dense matrix with zeros for what was removed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from compression.bonds import KEPT
from compression.refusal import Refusal

__all__ = ["check_kept", "kept", "put_kept_", "widened"]


def kept(layer: nn.Module) -> Mapping[str, torch.Tensor]:
    """Returns the numbers that `compression.bonds.keep_` stored in a layer, by name; empty for a whole matrix."""
    return {name: numbers for name, numbers in layer.named_buffers(recurse=False) if name in KEPT}


def put_kept_(layer: nn.Module, numbers: Mapping[str, torch.Tensor]) -> nn.Module:
    """Store in a layer the numbers that `kept` returned for the layer whose place it takes; returns the layer."""
    for name, values in numbers.items():
        layer.register_buffer(name, values)
    return layer


def check_kept(tensors: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> None:
    """Check the stored numbers of a layer, which would otherwise be used as indices unseen.

    Args:
        tensors: tensors by their names in the layer; others than those in `KEPT` are ignored.
        shape: shape of the dense matrix.

    Raises:
        ValueError: the numbers are not ascending rows or columns of the dense matrix.
    """
    for name, size in zip(KEPT, shape, strict=True):
        values = tensors[name].tolist() if name in tensors else []
        if values != sorted(set(values)) or not all(0 <= value < size for value in values):
            raise Refusal(f"{name} must be ascending numbers from 0 to {size - 1}")


def widened(
    layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None, shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the weight and bias of a layer at the shape of its dense matrix, with zeros for what was removed."""
    for axis, name in enumerate(KEPT):
        numbers = kept(layer).get(name)
        if numbers is None:
            continue
        index = numbers.to(weight.device).long()
        size = list(weight.shape)
        size[axis] = shape[axis]
        weight = weight.new_zeros(size).index_copy(axis, index, weight)
        if axis == 0 and bias is not None:
            bias = bias.new_zeros(shape[0]).index_copy(0, index, bias)
    return weight, bias
