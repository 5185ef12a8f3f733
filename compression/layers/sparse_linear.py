"""Defines `SparseLinear`, a linear layer that stores the entries of its matrix that are not 0, and one bit for each.

Knows tensors and modules; does not know which entries were removed or why. It is smaller than a dense layer, not
faster: the matrix is filled in whenever it is used, and given up afterwards, unless it is told to keep it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from compression.numerics.bitmask import pack, places, unpack
from compression.refusal import Refusal

__all__ = ["SparseLinear", "empty_sparse"]


class SparseLinear(nn.Module):
    """Computes y = W x + b with a sparse W (out, in).

    The state dict contains `values` (kept,), row by row, `bitmask` as `compression.numerics.bitmask.pack` makes it, and
    the bias, if any. Training changes values and never the mask. Parameters are created without gradients.

    Args:
        values: entries of W, row by row.
        bitmask: which entries they are, uint8 (out, ⌈in/8⌉); on the meta device it is checked by `check` later.
        columns: in.
        bias: (out,) or None.

    Attributes:
        keeps: whether the filled matrix stays in memory from the next `prepare` on, for the speed of a dense layer.

    Raises:
        ValueError: the mask is damaged, or does not name as many entries as there are values.
    """

    values: torch.Tensor
    bitmask: torch.Tensor
    filled: torch.Tensor | None

    def __init__(
        self, values: torch.Tensor, bitmask: torch.Tensor, columns: int, bias: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = len(bitmask), columns
        self.register_parameter("values", nn.Parameter(values, requires_grad=False))
        self.register_buffer("bitmask", bitmask)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.register_buffer("filled", None, persistent=False)
        self.keeps = False
        if not bitmask.is_meta:
            self.check()

    def prepare(self) -> None:
        """Fill the matrix in and keep it if it is to be kept; call this after values or `keeps` have changed."""
        self.filled = self.weight.detach() if self.keeps and not self.values.requires_grad else None

    @property
    def resident_bytes(self) -> int:
        """Bytes in memory, with the filled matrix if it is kept."""
        kept = [each for each in (self.values, self.bitmask, self._parameters["bias"], self.filled) if each is not None]
        return sum(each.numel() * each.element_size() for each in kept)

    def check(self) -> None:
        """Check the stored mask, which says where the values belong.

        Raises:
            ValueError: the mask is damaged, or does not name as many entries as there are values.
        """
        named = int(unpack(self.bitmask, self.in_features).sum())
        if self.values.shape != (named,):
            stored = tuple(self.values.shape)
            raise Refusal(f"the mask is damaged: it names {named} entries, but {stored} values are stored")

    @classmethod
    def of(cls, matrix: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor | None = None) -> SparseLinear:
        """Returns the layer that holds the entries of a matrix (out, in) in a mask, bool (out, in)."""
        return cls(matrix[mask], pack(mask), matrix.shape[1], bias)

    @property
    def weight(self) -> torch.Tensor:
        """W (out, in), filled in on every access; gradients reach the values."""
        at, values = places(self.bitmask, self.in_features), torch.cat([self.values.new_zeros(1), self.values])
        return values.index_select(0, at.flatten()).view(at.shape)

    def forward(self, activations: torch.Tensor) -> torch.Tensor:
        """Maps (…, in) to (…, out)."""
        weight = self.weight if self.filled is None else self.filled
        return functional.linear(activations, weight, self._parameters["bias"])

    def extra_repr(self) -> str:
        return (
            f"out={self.out_features}, in={self.in_features}, kept={len(self.values)}, "
            f"bias={self._parameters['bias'] is not None}"
        )


def empty_sparse(
    rows: int, columns: int, kept: int, bias: torch.Tensor | None, dtype: torch.dtype = torch.float32
) -> SparseLinear:
    """Returns a layer on the meta device that stores `kept` entries of a matrix (rows, columns).

    Raises:
        ValueError: the matrix does not have so many entries.
    """
    if type(kept) is not int or not 1 <= kept <= rows * columns:
        raise Refusal(f"the entries that are stored must be 1 to {rows * columns}, got {kept!r:.80}")
    values = torch.empty(kept, device="meta", dtype=dtype)
    bitmask = torch.empty(rows, -(-columns // 8), device="meta", dtype=torch.uint8)
    return SparseLinear(values, bitmask, columns, bias)
