"""Packs which entries of a matrix are stored into one bit each.

Takes tensors and returns tensors. Row after row, eight neighbours in a row share a byte, the first of them in its
lowest bit; a row that is not a multiple of eight ends in zero bits. The values that are stored follow row by row. This
is the layout of the format `sparse-bitmask` of compressed-tensors.
"""

from __future__ import annotations

import torch

from compression.refusal import Refusal

__all__ = ["bitmask_bytes", "pack", "unpack"]


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Returns the bits of a mask, bool (rows, columns), as uint8 (rows, ⌈columns/8⌉)."""
    rows, columns = mask.shape
    padded = torch.zeros(rows, -(-columns // 8) * 8, dtype=torch.uint8, device=mask.device)
    padded[:, :columns] = mask
    return (padded.view(rows, -1, 8) << _places(mask.device)).sum(-1, dtype=torch.uint8)


def unpack(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """Returns the mask, bool (rows, columns), of which `pack` returned the bits.

    Raises:
        ValueError: the bits have another shape or type, or one beyond the last column is set.
    """
    if bits.dtype != torch.uint8 or bits.ndim != 2 or bits.shape[1] != -(-columns // 8):
        raise Refusal(
            f"the mask of {columns} columns has {-(-columns // 8)} bytes a row, "
            f"got {tuple(bits.shape)} of {str(bits.dtype).removeprefix('torch.')}"
        )
    spread = (bits[:, :, None] >> _places(bits.device) & 1).bool().flatten(1)
    if spread[:, columns:].any():
        raise Refusal(f"the mask is damaged: it names an entry beyond column {columns}")
    return spread[:, :columns]


def bitmask_bytes(rows: int, columns: int) -> int:
    """Returns the bytes of the bits of a mask (rows, columns)."""
    return rows * -(-columns // 8)


def _places(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
