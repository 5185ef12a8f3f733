"""Says in how many bits numbers can be packed, and how many bytes a packed matrix takes. Computes with integers."""

from __future__ import annotations

__all__ = ["BITS", "FLOATING", "GROUP", "GROUPS", "SCALE", "packed_bytes"]

BITS = (8, 6, 5, 4, 3, 2)
FLOATING = 16
"""Bits of a number that is not packed, in files whose bytes are counted."""
GROUP, GROUPS = 64, (64, 32)
"""Neighbours that share a scale: usually, and all numbers of them that are used; 32 are what GGUF files have."""
SCALE = 2
"""Bytes of a scale, which is a float16."""


def packed_bytes(rows: int, columns: int, bits: int, group: int = GROUP, scale: int = SCALE) -> int:
    """Returns the bytes of a matrix (rows, columns) of integers, row by row, and of `scale` bytes for every group."""
    return rows * (-(-columns * bits // 8) + scale * -(-columns // group))
