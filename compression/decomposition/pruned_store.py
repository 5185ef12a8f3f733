"""Prunes the matrices of one model to a ladder of densities, and caches what is left at each.

Combines the pruning of a matrix with weights, metrics and the cache. Does not know the model they come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from compression.decomposition.measured import Measured
from compression.numerics.pruning import Pruned, prune
from compression.refusal import Refusal
from compression.sites import Site
from compression.storage.factor_cache import Bundle
from compression.storage.recent import RecentBundles

__all__ = ["PrunedStore", "ladder", "pruned_bytes"]

_FORMAT = 1
"""Part of the cache keys of what is made here; increase it when results change."""
_SHARES = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
"""Bytes of a pruned matrix, its mask included, relative to those of the dense one with 16 bits a number."""
_MASK = 1 / 16  # bytes of the mask, relative to those of the dense matrix


def ladder(site: Site) -> list[int]:
    """Returns the numbers of entries that a site is pruned to, descending, each at least 1 and fewer than all."""
    counts = {int((share - _MASK) * site.parameters) for share in _SHARES}
    return sorted((count for count in counts if 1 <= count < site.parameters), reverse=True)


def pruned_bytes(site: Site, itemsize: int) -> int:
    """Returns the bytes of what is stored of a site: its values at every density, and one for each of its entries."""
    return itemsize * sum(ladder(site)) + site.parameters


class PrunedStore:
    """Prunes the sites of one model on demand.

    Args:
        sites: the sites of the model.
        measured: their weights and metrics.
        recent: stores the results.
        stored: type of the stored values.
    """

    def __init__(
        self, sites: Sequence[Site], measured: Measured, recent: RecentBundles, stored: torch.dtype = torch.float32
    ) -> None:
        self._site = {site.name: site for site in sites}
        self._measured = measured
        self._recent = recent
        self._stored = stored
        self._costs: dict[str, Mapping[int, float]] = {}
        self._identities: dict[str, str] = {}

    def costs(self, name: str) -> Mapping[int, float]:
        """Returns the predicted cost in nats per token by number of entries kept, descending; empty if none is smaller.

        Raises:
            ValueError: the site must stay dense.
        """
        site = self._site[name]
        if site.dense_because:
            raise Refusal(f"site {name} must stay dense: {site.dense_because}")
        if name not in self._costs:
            kept = ladder(site)
            cost = self._bundle(name).tensors["cost"].tolist() if kept else []
            self._costs[name] = dict(zip(kept, cost, strict=True))
        return self._costs[name]

    def pruned(self, name: str, kept: int) -> Pruned:
        """Returns the matrix of a site with `kept` entries, float32 on the device of its weight.

        Raises:
            ValueError: the site must stay dense, or is not pruned to this number of entries.
        """
        costs = self.costs(name)
        if kept not in costs:
            nearest = min(costs, key=lambda count: abs(count - kept), default="none")
            raise Refusal(f"{name} is not pruned to {kept} entries; the nearest number is {nearest}")
        tensors, number = self._bundle(name).tensors, list(costs).index(kept)
        device = self._measured.weights[name].device
        mask = tensors["steps"].to(device) > number
        values = tensors[f"values.{number}"].to(device).float()
        # Several times as fast as masked_scatter: entry n of what is stored is value n, and 0 stands for no value.
        at = mask.flatten().cumsum(0, dtype=torch.int32) * mask.flatten()
        matrix = torch.cat([values.new_zeros(1), values]).index_select(0, at).view(mask.shape)
        return Pruned(matrix, mask, costs[kept])

    def _bundle(self, name: str) -> Bundle:
        """The results of a site: their values and costs, and how many of them every entry is in, uint8 (out, in)."""
        kept = ladder(self._site[name])
        if name not in self._identities:
            parts = {"kind": "pruned", "format": _FORMAT, "kept": kept, "stored": str(self._stored)}
            self._identities[name] = self._measured.key_of(name, **parts)

        def build() -> Bundle:
            matrix = self._measured.matrix(name)
            steps = torch.zeros(matrix.weight.shape, dtype=torch.uint8, device=matrix.weight.device)
            costs, values = [], {}
            for number, result in enumerate(prune(matrix.weight, matrix.inputs, matrix.gradients, kept)):
                steps += result.mask
                costs.append(result.cost)
                values[f"values.{number}"] = result.matrix[result.mask].to(self._stored).cpu()
            return Bundle({"steps": steps.cpu(), "cost": torch.tensor(costs, dtype=torch.float64), **values})

        return self._recent.get_or_build(self._identities[name], build)
