"""Shrinks second moments that were estimated from few rows towards what several of them have in common.

Works on arrays. The experts of a layer see different numbers of tokens, some of them hardly any. The weight of the
common moment follows from the data (Ledoit & Wolf 2004, "A well-conditioned estimator for large-dimensional covariance
matrices", with the pooled moment as the target): it is the variance of the estimate, divided by its squared distance
from the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

__all__ = ["MomentSum", "pooled_moments"]


@dataclass
class MomentSum:
    """Sums over the rows x that an estimate is made from.

    Attributes:
        outer: Σ x xᵀ (d, d).
        fourth: Σ ‖x‖⁴.
        rows: number of rows.
    """

    outer: torch.Tensor
    fourth: float
    rows: int


def pooled_moments(sums: Mapping[str, MomentSum], aligned: bool) -> dict[str, torch.Tensor]:
    """Returns the mean of x xᵀ by name (d, d), each shrunk towards the mean over the rows of all.

    Args:
        sums: the sums by name, of which one at least has rows. The moment of one without rows is the target itself.
        aligned: whether all rows are in the same coordinates. Otherwise the moments have only their scale in common,
            and the target is a multiple of the identity.
    """
    rows = sum(each.rows for each in sums.values())
    total: torch.Tensor = sum(each.outer for each in sums.values()) / rows  # type: ignore[assignment]
    target = total if aligned else torch.eye(len(total)).to(total) * total.diagonal().mean()
    return {name: _shrunk(each, target) for name, each in sums.items()}


def _shrunk(found: MomentSum, target: torch.Tensor) -> torch.Tensor:
    if found.rows < 2:
        return target.clone()
    mean = found.outer / found.rows
    variance = (found.fourth / found.rows - float(mean.square().sum())) / (found.rows - 1)
    distance = float((mean - target).square().sum())
    share = min(1.0, max(0.0, variance / distance)) if distance > 0 else 0.0
    return torch.lerp(mean, target, share)
