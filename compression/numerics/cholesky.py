"""Factorizes large second moments with as many digits as are needed.

A float64 factorization of a matrix of 8,960 values takes about ten seconds on two cores, twice as long as a float32
one, and a block of a model with MLPs of that width needs several.
"""

from __future__ import annotations

import torch

from compression.refusal import Refusal

__all__ = ["LARGE", "brief_cholesky", "cholesky"]

LARGE = 2048
"""Least number of values of a matrix that is factorized in float32."""


def brief_cholesky(moment: torch.Tensor) -> torch.Tensor:
    """Returns the lower factor L of M = L Lᵀ: of a large M in float32, unless that fails, and otherwise in float64.

    The error of float32, relative to the diagonal of M, is that of an M whose entries are known to 7 digits.

    Args:
        moment: M (d, d), float64.

    Raises:
        ValueError: M is not positive definite.
    """
    if len(moment) >= LARGE:
        found = torch.linalg.cholesky_ex(moment.float())
        if not found.info:
            short: torch.Tensor = found.L
            return short
    return cholesky(moment)


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
