"""Defines `SparseLinear`, a linear layer that stores the entries of its matrix that are not 0, and one bit for each.

Knows tensors and modules; does not know which entries were removed or why.
"""

from __future__ import annotations

import torch
from torch import nn

from compression.layers.filled_linear import FilledLinear
from compression.layers.packed import PackedMatrix, empty_packed
from compression.numerics.bitmask import pack, places, unpack
from compression.refusal import Refusal

__all__ = ["SparseLinear", "empty_sparse"]


class SparseLinear(FilledLinear):
    """Computes y = W x + b with a sparse W (out, in), see `compression.layers.filled_linear`.

    The state dict contains `values` (kept,), row by row, or their packed form `packed`, a matrix of one row; `bitmask`
    as `compression.numerics.bitmask.pack` makes it; and the bias, if any. Training changes values, or scales of packed
    ones, and never the mask. Parameters are created without gradients.

    Args:
        values: entries of W, row by row, or packed.
        bitmask: which entries they are, uint8 (out, ⌈in/8⌉); on the meta device it is checked by `check` later.
        columns: in.
        bias: (out,) or None.

    Raises:
        ValueError: the mask is damaged, or does not name as many entries as there are values.
    """

    values: torch.Tensor
    bitmask: torch.Tensor
    packed: PackedMatrix | None

    def __init__(
        self,
        values: torch.Tensor | PackedMatrix,
        bitmask: torch.Tensor,
        columns: int,
        bias: torch.Tensor | None = None,
    ) -> None:
        super().__init__((len(bitmask), columns), bias)
        if isinstance(values, PackedMatrix):
            self.packed = values
        else:
            self.packed = None
            self.register_parameter("values", nn.Parameter(values, requires_grad=False))
        self.register_buffer("bitmask", bitmask)
        if not bitmask.is_meta:
            self.check()

    @property
    def kept(self) -> int:
        """Number of entries that are stored."""
        return self._parameters["values"].numel() if self.packed is None else self.packed.columns  # type: ignore[union-attr]

    def check(self) -> None:
        """Check the stored mask, which says where the values belong.

        Raises:
            ValueError: the mask is damaged, or does not name as many entries as there are values.
        """
        named = int(unpack(self.bitmask, self.in_features).sum())
        stored = (self.packed.columns,) if self.packed is not None else tuple(self.values.shape)
        if stored != (named,):
            raise Refusal(f"the mask is damaged: it names {named} entries, but {stored} values are stored")

    @classmethod
    def of(cls, matrix: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor | None = None) -> SparseLinear:
        """Returns the layer that holds the entries of a matrix (out, in) in a mask, bool (out, in)."""
        return cls(matrix[mask], pack(mask), matrix.shape[1], bias)

    def fill(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Returns W (out, in); gradients reach the values."""
        at = places(self.bitmask, self.in_features)
        values = self.values if self.packed is None else self.packed.matrix(dtype)[0]
        values = torch.cat([values.new_zeros(1), values])
        return values.index_select(0, at.flatten()).view(at.shape)

    def extra_repr(self) -> str:
        return (
            f"out={self.out_features}, in={self.in_features}, kept={self.kept}, "
            f"bias={self._parameters['bias'] is not None}"
        )


def empty_sparse(
    rows: int,
    columns: int,
    kept: int,
    bias: torch.Tensor | None,
    dtype: torch.dtype = torch.float32,
    packing: tuple[int, int] | None = None,
) -> SparseLinear:
    """Returns a layer on the meta device that stores `kept` entries of a matrix (rows, columns).

    Args:
        packing: bits per number and numbers that share a scale if the entries are packed.

    Raises:
        ValueError: the matrix does not have so many entries, or they cannot be packed so.
    """
    if type(kept) is not int or not 1 <= kept <= rows * columns:
        raise Refusal(f"the entries that are stored must be 1 to {rows * columns}, got {kept!r:.80}")
    bitmask = torch.empty(rows, -(-columns // 8), device="meta", dtype=torch.uint8)
    if packing is not None:
        return SparseLinear(empty_packed(1, kept, *packing, dtype), bitmask, columns, bias)
    return SparseLinear(torch.empty(kept, device="meta", dtype=dtype), bitmask, columns, bias)
