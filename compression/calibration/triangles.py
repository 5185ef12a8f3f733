"""Stores symmetric matrices as their upper triangles, in half the space, or rounded to 16 bits, in a quarter of it.

Knows arrays only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isqrt

import torch

__all__ = ["Triangles", "mirror_upper_", "rounded", "triangle", "unrounded", "whole"]

_STEPS = 32767
_SQUARE = 1024


def triangle(matrix: torch.Tensor) -> torch.Tensor:
    """Returns the upper triangle of a matrix (n, n), row by row, as a vector of n (n + 1) / 2 entries."""
    return torch.cat([row[start:] for start, row in enumerate(matrix)])


def whole(vector: torch.Tensor) -> torch.Tensor:
    """Returns the symmetric matrix of which `triangle` returned the upper triangle; every entry is the same, bit for
    bit."""
    size = (isqrt(8 * len(vector) + 1) - 1) // 2
    matrix = vector.new_empty(size, size)
    at = 0
    for start in range(size):
        matrix[start, start:] = vector[at : at + size - start]
        at += size - start
    return mirror_upper_(matrix)


def mirror_upper_(matrix: torch.Tensor) -> torch.Tensor:
    """Copies the upper triangle of a square matrix to its lower one, in place; returns the matrix.

    By squares: a transposed copy of a large matrix leaves the cache at every number.
    """
    places = [slice(start, start + _SQUARE) for start in range(0, len(matrix), _SQUARE)]
    for number, here in enumerate(places):
        corner = matrix[here, here]
        corner.copy_(corner.triu() + corner.triu(1).mT)
        for further in places[number + 1 :]:
            matrix[further, here] = matrix[here, further].contiguous().mT.contiguous()
    return matrix


def rounded(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the correlations of a second moment M (n, n) as int16, a triangle, and its diagonal (n,), which is exact.

    An entry changes by at most √(Mᵢᵢ Mⱼⱼ)/65534, which is far below the shrinkage of a moment.
    """
    diagonal = moment.diagonal().clone()
    scale = diagonal.clamp_min(torch.finfo(moment.dtype).tiny).sqrt()
    correlations = moment / scale
    correlations.div_(scale[:, None]).clamp_(-1, 1)
    return triangle(correlations.mul_(_STEPS).round_().to(torch.int16)), diagonal


def unrounded(vector: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor:
    """Returns the second moment of which `rounded` returned the parts."""
    scale = diagonal.clamp_min(torch.finfo(diagonal.dtype).tiny).sqrt()
    moment = whole(vector).to(diagonal.dtype).mul_(scale / _STEPS).mul_(scale[:, None])
    moment.diagonal().copy_(diagonal)
    return moment


class Triangles(Mapping[str, torch.Tensor]):
    """Maps names to symmetric matrices, each of which is made from its upper triangle when it is asked for.

    Args:
        vectors: the upper triangles by name, see `triangle`. They may be memory-mapped.
    """

    def __init__(self, vectors: Mapping[str, torch.Tensor]) -> None:
        self._vectors = vectors

    def __getitem__(self, name: str) -> torch.Tensor:
        return whole(self._vectors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._vectors)

    def __len__(self) -> int:
        return len(self._vectors)
