"""Factors: the decomposition of every site, made once per topology and metric, serving every χ.

Composes whitening, sequential SVD and the cache; knows weights and statistics, not the model they came from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from compression.cache import Bundle, FactorCache, cache_key
from compression.legs import resolve
from compression.menu import Menu, dense_menu, lowrank_menu
from compression.mpo import decompose, truncate
from compression.schedule import Choice
from compression.sites import Site
from compression.statistics import Statistics
from compression.whitening import Whitening

__all__ = ["FactorStore", "Factors"]

_FORMAT = 2  # part of every cache key; raise it when the numbers a decomposition gives change


@dataclass(frozen=True, eq=False)
class Factors:
    """Cores of one site up to the χ where they stop saving parameters, and the spectrum of the first bond.

    Attributes:
        cores: axes (left, out, in, right), float32; slice the bonds for a smaller χ.
        spectrum: singular values in the metric, float64, descending, full length; with a cap on χ as far as they are
            known, and then the norm of all beyond them as one value.
    """

    cores: list[torch.Tensor]
    spectrum: torch.Tensor


class FactorStore:
    """Decompositions of the sites of one model, built on demand and cached.

    Args:
        sites: the sites.
        weights: dense matrix (out, in) per site name; of sites that stay dense none is needed.
        statistics: gives the second moments when a decomposition in a metric has to be built; not called when
            everything asked for is in the cache.
        statistics_key: identity of those statistics (model, text, seed).
        shrinkage: see `compression.whitening.shrink`.
        cache: where decompositions are kept.
        max_chi: decompose no further than this χ; None means as far as it saves parameters.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        weights: Mapping[str, torch.Tensor],
        statistics: Callable[[], Statistics],
        statistics_key: str,
        shrinkage: float,
        cache: FactorCache,
        max_chi: int | None = None,
    ) -> None:
        self.sites = tuple(sites)
        self._weights = weights
        self._statistics = statistics
        self._statistics_key = statistics_key
        self._shrinkage = shrinkage
        self._cache = cache
        self._max_chi = max_chi
        self._site = {site.name: site for site in sites}
        self._memory: dict[tuple[str, str, str], Factors] = {}

    def factors(self, name: str, topology: str, metric: str) -> Factors:
        """The decomposition of one site.

        Raises:
            ValueError: unknown topology or metric, or a topology that is not offered in this metric.
        """
        memory_key = (name, topology, metric)
        if memory_key not in self._memory:
            bundle = self._cache.get_or_build(self._key(name, topology, metric), lambda: self._build(*memory_key))
            cores = [bundle.tensors[f"core.{number}"] for number in range(len(bundle.tensors) - 1)]
            self._memory[memory_key] = Factors(cores, bundle.tensors["spectrum"])
        return self._memory[memory_key]

    def cores(self, name: str, choice: Choice) -> list[torch.Tensor]:
        """The cores of one site at the χ of `choice`: views into the decomposition.

        Raises:
            ValueError: a site that stays dense, a topology that never saves parameters at this shape, or χ above the
                largest that does.
        """
        site = self._site[name]
        if site.dense_because:
            raise ValueError(f"site {name} must stay dense: {site.dense_because}")
        limit = resolve(choice.topology, site.out_features, site.in_features).break_even_chi
        if limit == 0:
            shape = f"{site.out_features} × {site.in_features}"
            raise ValueError(f"site {name}: no χ of {choice.topology} makes a matrix of {shape} smaller")
        limit = min(limit, self._max_chi or limit)
        if choice.chi > limit:
            raise ValueError(f"chi of {name} must be at most {limit} for {choice.topology}, got {choice.chi}")
        return truncate(self.factors(name, choice.topology, choice.metric).cores, choice.chi)

    def menu(self, metric: str = "two-sided", progress: Callable[[int], None] = lambda done: None) -> Menu:
        """Menus of all sites: dense, and `lowrank` at every χ where possible. Decomposes what is not yet cached."""
        menus = []
        for done, site in enumerate(self.sites, 1):
            if site.dense_because:
                menus.append(dense_menu(site))
            else:
                spectrum = self.factors(site.name, "lowrank", metric).spectrum.numpy()
                menus.append(lowrank_menu(site, np.asarray(spectrum, dtype=np.float64), metric))
            progress(done)
        return Menu(tuple(menus))

    def _key(self, name: str, topology: str, metric: str) -> str:
        weight = self._weights[name].detach().cpu().contiguous()
        digest = hashlib.sha256(weight.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        calibrated = {} if metric == "plain" else {"statistics": self._statistics_key, "shrinkage": self._shrinkage}
        capped = {} if self._max_chi is None else {"max_chi": self._max_chi}
        return cache_key(
            format=_FORMAT,
            weight=digest,
            dtype=str(weight.dtype),
            site=name,
            topology=topology,
            metric=metric,
            **calibrated,
            **capped,
        )

    def _build(self, name: str, topology: str, metric: str) -> Bundle:
        site = self._site[name]
        legs = resolve(topology, site.out_features, site.in_features)
        whitening = self._whitening(name, metric)
        if topology != "lowrank" and metric != "plain":
            raise ValueError(f"topology {topology} is only offered in the plain metric, got {metric!r}")
        white = whitening.apply(self._weights[name].detach()).float()
        cores, spectra = decompose(white, legs, self._max_chi)
        cores = truncate(cores, max(1, legs.break_even_chi))
        if topology == "lowrank":
            left = whitening.undo_left(cores[0][0, :, 0, :].double())
            right = whitening.undo_right(cores[1][:, 0, :, 0].double())
            # Every pair of a column and a row gets equal norms, whatever the metric, so that float16 holds both.
            share = (right.norm(dim=1) / left.norm(dim=0)).sqrt()
            left, right = left * share, right / share.where(share > 0, 1)[:, None]
            cores = [left[None, :, None, :], right[:, None, :, None]]
        tensors = {f"core.{number}": core.float().cpu() for number, core in enumerate(cores)}
        return Bundle({**tensors, "spectrum": spectra[0].closed().cpu()})

    def _whitening(self, name: str, metric: str) -> Whitening:
        if metric == "plain":
            return Whitening(None, None)
        if metric not in ("input", "two-sided"):
            raise ValueError(f"metric must be plain, input or two-sided, got {metric!r}")
        statistics, device = self._statistics(), self._weights[name].device
        gradient = statistics.gradient(name).to(device) if metric == "two-sided" else None
        return Whitening.of(statistics.input(name).to(device), gradient, self._shrinkage)
