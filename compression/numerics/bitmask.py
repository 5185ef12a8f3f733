"""Packs which entries of a matrix are stored into one bit each.

Takes tensors and returns tensors. Row after row, eight neighbours in a row share a byte, the first of them in its
lowest bit; a row that is not a multiple of eight ends in zero bits. The values that are stored follow row by row. This
is the layout of the format `sparse-bitmask` of compressed-tensors.
"""

from __future__ import annotations

from functools import cache

import torch

from compression.refusal import Refusal

__all__ = ["bitmask_bytes", "pack", "places", "unpack"]


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
    spread = _bits_of(bits.device).index_select(0, bits.flatten().int()).view(torch.bool).view(len(bits), -1)
    if spread[:, columns:].any():
        raise Refusal(f"the mask is damaged: it names an entry beyond column {columns}")
    return spread[:, :columns]


def places(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """Returns which stored value each entry has, int32 (rows, columns), counted from 1; 0 for an entry without one.

    Raises:
        ValueError: as for `unpack`.
    """
    mask, counts = unpack(bits, columns), _counts(bits.device)
    among = counts.index_select(0, bits.flatten().int())
    before = among[:, -1].cumsum(0, dtype=torch.int32) - among[:, -1]
    return among.add_(before[:, None]).view(len(bits), -1)[:, :columns] * mask


def bitmask_bytes(rows: int, columns: int) -> int:
    """Returns the bytes of the bits of a mask (rows, columns)."""
    return rows * -(-columns // 8)


def _places(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


@cache
def _bits_of(device: torch.device) -> torch.Tensor:
    """The eight bits of every byte as eight bytes in one int64, (256,)."""
    bits = torch.arange(256, dtype=torch.uint8, device=device)[:, None] >> _places(device) & 1
    return bits.view(torch.int64).flatten()


@cache
def _counts(device: torch.device) -> torch.Tensor:
    """For every byte, the number of bits that are set up to each of its eight, int32 (256, 8)."""
    return _bits_of(device).view(torch.uint8).view(256, 8).cumsum(1, dtype=torch.int32)
