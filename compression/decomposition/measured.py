"""Holds the weights of the sites with the metrics in which their errors are measured, and makes cache keys from both.

Knows weights and statistics; does not know decompositions or files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from compression.calibration.statistics import Statistics
from compression.numerics.whitening import shrink
from compression.refusal import Refusal
from compression.storage.factor_cache import cache_key

__all__ = ["FORMAT", "Matrix", "Measured"]

FORMAT = 2
"""Part of every cache key; increase it when decompositions change numerically."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """Holds a matrix with its metric, float64; large moments are float32, see `compression.numerics.large_moments`.

    Attributes:
        weight: W (out, in).
        inputs: C (in, in), positive definite.
        gradients: G (out, out), positive definite.
        size: rows or columns of it per group of its bond; 1 if it is not cut by one.
    """

    weight: torch.Tensor
    inputs: torch.Tensor
    gradients: torch.Tensor
    size: int = 1


@dataclass(frozen=True, eq=False)
class Measured:
    """Holds the weights of the sites of one model and their second moments.

    Attributes:
        weights: dense matrix (out, in) by site name, which must not change; not needed for sites that must stay dense.
        statistics: returns the second moments, when they are first needed.
        key: identifies these statistics (model, text, seed).
        shrinkage: see `compression.numerics.whitening.shrink`.
    """

    weights: Mapping[str, torch.Tensor]
    statistics: Callable[[], Statistics]
    key: str
    shrinkage: float
    _digests: dict[str, str] = field(default_factory=dict, repr=False)

    def moments(self, name: str, metric: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Returns C and G of a site, not shrunk, on the device of its weight; None for those the metric does not use.

        Raises:
            ValueError: the metric is unknown.
        """
        if metric == "plain":
            return None, None
        if metric not in ("input", "two-sided"):
            raise Refusal(f"metric must be plain, input or two-sided, got {metric!r}")
        statistics, device = self.statistics(), self.weights[name].device
        gradient = statistics.gradient(name).to(device) if metric == "two-sided" else None
        return statistics.input(name).to(device), gradient

    def matrix(self, name: str, size: int = 1) -> Matrix:
        """Returns the whole matrix of a site with its shrunk two-sided metric; `size` as in `Matrix`."""
        inputs, gradients = self.moments(name, "two-sided")
        assert inputs is not None
        assert gradients is not None
        shrunk = shrink(inputs, self.shrinkage), shrink(gradients, self.shrinkage)
        return Matrix(self.weights[name].detach().double(), *shrunk, size)

    def digest(self, name: str) -> str:
        """Returns the SHA-256 of a weight's bytes, 64 hexadecimal digits; each weight is read once."""
        if name not in self._digests:
            weight = self.weights[name].detach().cpu().contiguous()
            self._digests[name] = hashlib.sha256(weight.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
        return self._digests[name]

    def key_of(self, *names: str, **parts: object) -> str:
        """Returns the cache key of something that is made from the weights and the two-sided metrics of some sites."""
        return cache_key(
            decompositions=FORMAT,
            sites=names,
            weights=[f"{self.weights[name].dtype} {self.digest(name)}" for name in names],
            statistics=self.key,
            shrinkage=self.shrinkage,
            **parts,
        )
