"""Factors: the decomposition of every site, made once per topology and metric, serving every χ.

Composes whitening, sequential SVD and the cache; knows weights and statistics, not the model they came from.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from compression.allocation.menu import Menu, Option, dense_menu, envelope, nested_options
from compression.calibration.statistics import Statistics
from compression.numerics.cores import decompose, truncate
from compression.numerics.fit import fit
from compression.numerics.legs import Legs, resolve
from compression.numerics.whitening import Whitening, shrink
from compression.refusal import Refusal
from compression.schedule import Choice
from compression.sites import Site
from compression.storage.factor_cache import Bundle, FactorCache, cache_key

__all__ = ["OPTIMISM", "FactorStore", "Factors", "is_nested", "lowrank_cores"]

_FORMAT = 2  # part of every cache key; raise it when the numbers a decomposition gives change
_EVALUATIONS, _GLANCE, _TOLERANCE = 150, 20, 3e-3
"""Products a fit may spend, those of a first look at whether it may come to something, and when a fit has converged."""
_FIRST, _GRID = 0.4, (0.2, 0.3, 0.5, 0.65)
"""Kept fractions a topology is fitted at in a menu; at the others only if it is worth it at the first."""
_HOPEFUL, _WORTH = 1.5, 1.05
"""Largest cost, in costs of `lowrank` at equal parameters, that a first look and a fit may have."""

OPTIMISM = 1.15
"""What a fit costs on other text over what it costs on its calibration text, in units of the same ratio of `lowrank`.

Free to follow the moments in more ways, a fit also follows their noise: on search text, with 24k calibration tokens,
fits of k, v and down lost 1.02 to 1.2 times what low rank lost. Menus multiply by it, so that a fit is offered only
where it wins beyond that.
"""


@dataclass(frozen=True, eq=False)
class Factors:
    """Cores of one site, and what they cost.

    Attributes:
        cores: axes (left, out, in, right), float32. Of a decomposition, as far as it saves parameters: slice the bonds
            for a smaller χ. Of a fit, for its own χ only.
        spectrum: singular values in the metric, float64, descending, full length; with a cap on χ as far as they are
            known, and then the norm of all beyond them as one value. Of a fit, that norm alone: the root of twice its
            cost.
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
        shrinkage: see `compression.numerics.whitening.shrink`.
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
        self._memory: dict[_Key, Factors] = {}

    def factors(self, name: str, topology: str, metric: str, chi: int = 0) -> Factors:
        """The decomposition of one site, or its fit at one χ.

        Args:
            chi: what is fitted; of no effect where one decomposition serves every χ (see `is_nested`).

        Raises:
            ValueError: unknown topology or metric.
        """
        return self._factors(_Key.of(name, topology, metric, chi))

    def _factors(self, key: _Key) -> Factors:
        if key not in self._memory:
            bundle = self._cache.get_or_build(self._identity(key), lambda: self._build(key))
            cores = [bundle.tensors[f"core.{number}"] for number in range(len(bundle.tensors) - 1)]
            self._memory[key] = Factors(cores, bundle.tensors["spectrum"])
        return self._memory[key]

    def cores(self, name: str, choice: Choice) -> list[torch.Tensor]:
        """The cores of one site at the χ of `choice`, without gauge fixing: views into a decomposition, or a fit.

        Raises:
            ValueError: a site that stays dense, a topology that never saves parameters at this shape, or χ above the
                largest that does.
        """
        site = self._site[name]
        if site.dense_because:
            raise Refusal(f"site {name} must stay dense: {site.dense_because}")
        limit = resolve(choice.topology, site.out_features, site.in_features).break_even_chi
        if limit == 0:
            shape = f"{site.out_features} × {site.in_features}"
            raise Refusal(f"site {name}: no χ of {choice.topology} makes a matrix of {shape} smaller")
        limit = min(limit, self._max_chi or limit)
        if choice.chi > limit:
            raise Refusal(f"chi of {name} must be at most {limit} for {choice.topology}, got {choice.chi}")
        return truncate(self.factors(name, choice.topology, choice.metric, choice.chi).cores, choice.chi)

    def menu(
        self,
        metric: str = "two-sided",
        topology: str = "pivoted-lowrank",
        fitted: Mapping[str, Sequence[str]] | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Menu:
        """Menus of all sites: the lower envelope of dense, `topology` at every χ, and fits. Builds what is not cached.

        Args:
            topology: `lowrank` or `pivoted-lowrank`.
            fitted: by site name, topologies that are fitted at several χ where a first fit comes close to `topology`.
            progress: called with the number of sites done.
        """
        menus = []
        for done, site in enumerate(self.sites, 1):
            if site.dense_because:
                menus.append(dense_menu(site))
            else:
                spectrum = np.asarray(self.factors(site.name, topology, metric).spectrum.numpy(), dtype=np.float64)
                options = nested_options(topology, metric, spectrum, site, self._max_chi)
                for other in (fitted or {}).get(site.name, ()):
                    options += self._fitted_options(site, other, metric, options)
                menus.append(envelope(site, options))
            progress(done)
        return Menu(tuple(menus))

    def _fitted_options(self, site: Site, topology: str, metric: str, nested: Sequence[Option]) -> list[Option]:
        """`topology` at the kept fractions of the grid, or at one only where that shows it is not worth more."""
        legs = resolve(topology, site.out_features, site.in_features)
        sizes = [
            resolve(option.choice.topology, site.out_features, site.in_features).parameters(option.choice.chi)
            for option in nested
        ]
        options: list[Option] = []
        for kept in (_FIRST, *_GRID):
            chi = legs.largest_chi(min(int(kept * site.parameters), site.parameters - 1))
            if chi == 0 or any(option.choice.chi == chi for option in options):
                continue
            rival = nested[max(0, bisect_right(sizes, legs.parameters(chi)) - 1)].cost
            if not options and self._fit_cost(site.name, topology, metric, chi, _GLANCE) > _HOPEFUL * rival:
                break
            cost = OPTIMISM * self._fit_cost(site.name, topology, metric, chi, _EVALUATIONS)
            options.append(Option(Choice(topology, chi, metric), cost))
            if cost > _WORTH * rival and len(options) == 1:
                break
        return options

    def _fit_cost(self, name: str, topology: str, metric: str, chi: int, evaluations: int) -> float:
        tail = self._factors(_Key.of(name, topology, metric, chi, evaluations)).spectrum
        return 0.5 * float(tail.double().square().sum())

    def _identity(self, key: _Key) -> str:
        weight = self._weights[key.name].detach().cpu().contiguous()
        digest = hashlib.sha256(weight.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        calibrated = {} if key.metric == "plain" else {"statistics": self._statistics_key, "shrinkage": self._shrinkage}
        capped = {} if self._max_chi is None else {"max_chi": self._max_chi}
        fitted = {"chi": key.chi, "evaluations": key.evaluations, "tolerance": _TOLERANCE} if key.chi else {}
        return cache_key(
            format=_FORMAT,
            weight=digest,
            dtype=str(weight.dtype),
            site=key.name,
            topology=key.topology,
            metric=key.metric,
            **calibrated,
            **capped,
            **fitted,
        )

    def _build(self, key: _Key) -> Bundle:
        site = self._site[key.name]
        legs = resolve(key.topology, site.out_features, site.in_features)
        if key.chi:
            return self._fit(key, legs)
        whitening = self._whitening(key.name, key.metric)
        weight = self._weights[key.name].detach()
        if key.topology == "lowrank":
            cores, spectrum = lowrank_cores(weight, whitening, self._max_chi)
        else:
            cores, spectra = decompose(weight.float(), legs, self._max_chi)
            spectrum = spectra[0].closed()
        cores = truncate(cores, max(1, Legs(legs.out_legs, legs.in_legs, pivoted=True).break_even_chi))
        tensors = {f"core.{number}": core.float().cpu() for number, core in enumerate(cores)}
        return Bundle({**tensors, "spectrum": spectrum.cpu()})

    def _fit(self, key: _Key, legs: Legs) -> Bundle:
        weight = self._weights[key.name].detach()
        moments = self._moments(key.name, key.metric)
        identity = torch.eye(weight.shape[0], dtype=torch.float64, device=weight.device)
        inputs, gradients = (None if moment is None else shrink(moment, self._shrinkage) for moment in moments)
        assert inputs is not None
        metrics = (identity if gradients is None else gradients)[None], inputs[None]
        result = fit(weight[None], *metrics, legs, key.chi, key.evaluations, _TOLERANCE)
        tensors = {f"core.{number}": core[0].cpu() for number, core in enumerate(result.cores)}
        return Bundle({**tensors, "spectrum": (2 * result.cost).sqrt().cpu()}, {"start": f"{float(result.start):.6g}"})

    def _whitening(self, name: str, metric: str) -> Whitening:
        return Whitening.of(*self._moments(name, metric), self._shrinkage)

    def _moments(self, name: str, metric: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """C and G of a site as far as the metric has them."""
        if metric == "plain":
            return None, None
        if metric not in ("input", "two-sided"):
            raise Refusal(f"metric must be plain, input or two-sided, got {metric!r}")
        statistics, device = self._statistics(), self._weights[name].device
        gradient = statistics.gradient(name).to(device) if metric == "two-sided" else None
        return statistics.input(name).to(device), gradient


def lowrank_cores(
    weight: torch.Tensor, whitening: Whitening, max_chi: int | None
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Cores (1, out, 1, χ) and (χ, 1, in, 1) of `lowrank` in a metric, and the spectrum of the whitened matrix.

    Float64; slicing the bond gives the best matrix of every smaller rank.
    """
    white = whitening.apply(weight).float()
    cores, spectra = decompose(white, resolve("lowrank", *white.shape), max_chi)
    left = whitening.undo_left(cores[0][0, :, 0, :].double())
    right = whitening.undo_right(cores[1][:, 0, :, 0].double())
    # Every pair of a column and a row gets equal norms, whatever the metric, so that float16 holds both.
    share = (right.norm(dim=1) / left.norm(dim=0)).sqrt()
    left, right = left * share, right / share.where(share > 0, 1)[:, None]
    return [left[None, :, None, :], right[:, None, :, None]], spectra[0].closed()


def is_nested(topology: str, metric: str) -> bool:
    """Whether one decomposition serves every χ: `lowrank` in any metric, every MPO in the plain one."""
    return metric == "plain" or topology.removeprefix("pivoted-") == "lowrank"


@dataclass(frozen=True)
class _Key:
    """What is kept once: χ is 0 where one decomposition serves every χ, and gauge fixing changes no matrix."""

    name: str
    topology: str
    metric: str
    chi: int
    evaluations: int

    @classmethod
    def of(cls, name: str, topology: str, metric: str, chi: int, evaluations: int = _EVALUATIONS) -> _Key:
        nested = is_nested(topology, metric)
        if not nested and chi < 1:
            raise Refusal(f"site {name}: {topology} in the {metric} metric is fitted for one χ, got {chi}")
        return cls(name, topology.removeprefix("pivoted-"), metric, 0 if nested else chi, evaluations)
