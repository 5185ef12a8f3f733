"""Factorizes and multiplies large second moments with as many digits as are needed.

A float64 factorization of a matrix of 8,960 values takes about ten seconds on two cores, twice as long as a float32
one, and a block of a model with MLPs of that width needs several. Moments are estimates: of few thousand tokens, and
summed in float32. Large ones are therefore held in float32 as well, 0.3 GB at this size.
"""

from __future__ import annotations

import torch

from compression.refusal import Refusal

__all__ = ["LARGE", "brief_cholesky", "brief_product", "cholesky", "moment_dtype"]

LARGE = 2048
"""Least number of values of a moment with which float32 is used."""


def moment_dtype(values: int) -> torch.dtype:
    """Returns the type in which moments of so many values are held: float32 for large ones, otherwise float64."""
    return torch.float32 if values >= LARGE else torch.float64


def brief_cholesky(moment: torch.Tensor) -> torch.Tensor:
    """Returns the lower factor L of M = L Lᵀ: of a large M in float32, unless that fails, and otherwise in float64.

    The error of float32, relative to the diagonal of M, is that of an M whose entries are known to 7 digits.

    Args:
        moment: M (d, d), float64 or float32.

    Raises:
        ValueError: M is not positive definite.
    """
    if len(moment) >= LARGE:
        found = torch.linalg.cholesky_ex(moment.float())
        if not found.info:
            short: torch.Tensor = found.L
            return short
    return cholesky(moment.double())


def brief_product(moment: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Returns M X, float64: of a large M computed in float32, with errors of 1e-7 of the norms of rows and columns.

    Args:
        moment: M (n, d), float64 or float32, or some rows and columns of it.
        matrix: X (d, m), float64.
    """
    if moment.shape[1] < LARGE:
        return moment.double() @ matrix
    return (moment.float() @ matrix.float()).double()


def cholesky(moment: torch.Tensor) -> torch.Tensor:
    """Returns the lower factor L of M = L Lᵀ, for M (d, d), in its dtype.

    Raises:
        ValueError: M is not positive definite.
    """
    found = torch.linalg.cholesky_ex(moment)
    if found.info:
        raise Refusal("a second moment is not positive definite; shrink it first")
    factor: torch.Tensor = found.L
    return factor
