"""Defines `FilledLinear`, a linear layer that stores its matrix in fewer bytes than a dense one.

Knows tensors and modules; the classes under it know how the matrix is stored. It is smaller than a dense layer, not
faster: the matrix is filled in whenever it is used, and given up afterwards, unless it is told to keep it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

__all__ = ["FilledLinear"]


class FilledLinear(nn.Module):
    """Computes y = W x + b with a W (out, in) that is filled in.

    Args:
        shape: (out, in).
        bias: (out,) or None.

    Attributes:
        keeps: whether the filled matrix stays in memory from the next `prepare` on, for the speed of a dense layer.
    """

    filled: torch.Tensor | None

    def __init__(self, shape: tuple[int, int], bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.register_buffer("filled", None, persistent=False)
        self.keeps = False

    def fill(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Returns W (out, in) in a type, by default that of the model; gradients reach what is stored."""
        raise NotImplementedError

    @property
    def weight(self) -> torch.Tensor:
        """W (out, in), filled in on every access."""
        return self.fill()

    @property
    def learns(self) -> bool:
        """Whether what is stored is being trained, so that a filled matrix would soon be out of date."""
        return any(each.requires_grad for each in self.parameters())

    def prepare(self) -> None:
        """Fill the matrix in and keep it if it is to be kept; call this after what is stored or `keeps` changed."""
        self.filled = self.fill().detach() if self.keeps and not self.learns else None

    @property
    def resident_bytes(self) -> int:
        """Bytes in memory, with the filled matrix if it is kept."""
        return sum(each.numel() * each.element_size() for each in (*self.parameters(), *self.buffers()))

    def forward(self, activations: torch.Tensor) -> torch.Tensor:
        """Maps (…, in) to (…, out)."""
        weight = self.fill(activations.dtype) if self.filled is None else self.filled
        return functional.linear(activations, weight, self._parameters["bias"])
