"""Decomposes every site, once per topology and metric for all χ, or by one fit per χ.

Combines whitening, sequential SVD, fits and the cache. Knows weights and statistics; does not know the model they come
from.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from compression.allocation.menu import Menu, Option, aligned, dense_menu, envelope, nested_options
from compression.calibration.statistics import Statistics
from compression.decomposition.bond_store import BondStore
from compression.decomposition.entry_store import EntryForms, EntryStore
from compression.decomposition.measured import FORMAT, Measured
from compression.numerics.cores import decompose, truncate
from compression.numerics.fit import fit
from compression.numerics.legs import Legs, resolve
from compression.numerics.whitening import lowrank, shrink
from compression.refusal import Refusal
from compression.schedule import Choice, Form
from compression.sites import Site, Unit, members, units
from compression.size import Price, choice_parameters
from compression.storage.factor_cache import Bundle, FactorCache, cache_key
from compression.storage.limited import LimitedBundles

__all__ = ["OPTIMISM", "FactorStore", "Factors", "is_nested", "lowrank_cores"]

_EVALUATIONS, _GLANCE, _TOLERANCE = 150, 20, 3e-3
"""Evaluations of a full fit, evaluations of a short trial fit, and the tolerance at which a fit has converged."""
_FIRST, _GRID = 0.4, (0.2, 0.3, 0.5, 0.65)
"""Kept fractions at which a menu fits a topology: the first one, and the grid only if the first fit is good enough."""
_HOPEFUL, _WORTH = 1.5, 1.05
"""Largest acceptable costs of a trial fit and of a full fit, relative to `lowrank` with as many parameters."""

OPTIMISM = 1.15
"""Factor by which the cost of a fit grows from its calibration text to other text, relative to that of `lowrank`.

A fit has more freedom to follow the moments than `lowrank`, and therefore also follows their noise. From 24k
calibration tokens to search text, the cost of fits of k, v and down grew 1.02 to 1.2 times as much as that of low rank.
Menus multiply the cost of a fit by this factor, so a fit is offered only if it wins by more than that.
"""


@dataclass(frozen=True, eq=False)
class Factors:
    """Holds the cores of one site and the values that determine their cost.

    Attributes:
        cores: axes (left, out, in, right), float32 or float16. A decomposition has bonds up to the largest χ that saves
            parameters; slice them for a smaller χ. The cores of a fit are valid for its own χ only.
        spectrum: singular values in the metric, float64, descending. With a cap on χ: the known values, followed by one
            value that is the norm of all others. For a fit: a single value, the square root of twice its cost.
    """

    cores: list[torch.Tensor]
    spectrum: torch.Tensor


class FactorStore:
    """Builds decompositions of the sites of one model on demand and caches them.

    Args:
        sites: the sites of the model.
        weights: dense matrix (out, in) by site name; not needed for sites that must stay dense.
        statistics: returns the second moments. Called only if a decomposition in a metric is not cached.
        statistics_key: identifies these statistics (model, text, seed).
        shrinkage: see `compression.numerics.whitening.shrink`.
        cache: stores the decompositions.
        max_chi: largest χ to decompose to; None means the largest χ that saves parameters.
        half: store the cores of decompositions and refitted matrices in float16, in half the space. The columns and
            rows of a bond have equal norms, so that they stay within its range.
        limit: bytes of decompositions that the cache keeps, see `compression.storage.limited`; None keeps all.
        forms: what menus by bytes offer of whole matrices.

    Attributes:
        sites: as given.
        bonds: cuts the bonds between the sites.
        entries: prunes and rounds the sites, for menus by bytes.
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
        half: bool = False,
        limit: int | None = None,
        forms: EntryForms | None = None,
    ) -> None:
        self.sites = tuple(sites)
        self._measured = Measured(weights, statistics, statistics_key, shrinkage)
        self._max_chi = max_chi
        self._stored = torch.float16 if half else torch.float32
        self._site = {site.name: site for site in sites}
        self._limited = LimitedBundles(cache, limit)
        self._identities: dict[_Key, str] = {}
        self.progress: Callable[[int, int], None] = lambda done, total: None
        """Called by appliers with the number of matrices of a schedule that are there, and of those that it needs."""
        self.bonds = BondStore(sites, self._measured, cache, self._limited, self._stored)
        self.entries = EntryStore(sites, self._measured, self._limited, self._stored, forms or EntryForms())

    def factors(self, name: str, topology: str, metric: str, chi: int = 0, widths: tuple[int, ...] = ()) -> Factors:
        """Returns the decomposition of one site, or its fit at one χ.

        Args:
            chi: χ of the fit; ignored if one decomposition serves every χ (see `is_nested`).
            widths: widths of the site's bonds; empty for the whole matrix.

        Raises:
            ValueError: the topology or metric is unknown, or a fit is requested without a χ.
        """
        return self._factors(_Key.of(name, topology, metric, chi, widths=widths))

    def _factors(self, key: _Key) -> Factors:
        if key not in self._identities:
            self._identities[key] = self._identity(key)
        tensors = self._limited.get_or_build(self._identities[key], lambda: self._build(key)).tensors
        return Factors([tensors[f"core.{number}"] for number in range(len(tensors) - 1)], tensors["spectrum"])

    def cores(self, name: str, choice: Choice) -> list[torch.Tensor]:
        """Returns the cores of one site at the χ of `choice`, without gauge fixing.

        They are float32, and views into a decomposition or into a fit unless these are stored in float16.

        Raises:
            ValueError: the site must stay dense, no χ of the topology saves parameters at this shape, or χ exceeds the
                largest one that does.
        """
        site = self._site[name]
        if site.dense_because:
            raise Refusal(f"site {name} must stay dense: {site.dense_because}")
        rows, columns = site.shape(choice.widths)
        limit = resolve(choice.topology, rows, columns).break_even_chi
        if limit == 0:
            raise Refusal(f"site {name}: no χ of {choice.topology} makes a matrix of {rows} × {columns} smaller")
        limit = min(limit, self._max_chi or limit)
        if choice.chi > limit:
            raise Refusal(f"chi of {name} must be at most {limit} for {choice.topology}, got {choice.chi}")
        factors = self.factors(name, choice.topology, choice.metric, choice.chi, choice.widths)
        return [core.float() for core in truncate(factors.cores, choice.chi)]

    def menu(
        self,
        metric: str = "two-sided",
        topology: str = "pivoted-lowrank",
        fitted: Mapping[str, Sequence[str]] | None = None,
        progress: Callable[[int], None] = lambda done: None,
        form: Form = "any",
        multiple: int | None = None,
        chi_multiple: int = 1,
        price: Price = choice_parameters,
        factored: bool = True,
    ) -> Menu:
        """Returns the menus of all sites and units: the lower envelope of dense, `topology` at every χ, and fits.

        The options of a unit are the widths of its bond, each with every χ of `topology` for what is left. For the form
        "small", whole matrices may also be pruned and rounded.

        Decompositions, fits and entries that are not cached are built.

        Args:
            topology: `lowrank` or `pivoted-lowrank`.
            fitted: topologies to fit, by site name. Each is fitted at several χ if a first fit comes close to
                `topology`.
            progress: called with the number of sites done.
            form: what the menus offer, see `compression.schedule.Form`.
            multiple: rows and columns that bonds leave are multiples of this; None means what is fast on the device.
            chi_multiple: bond dimensions are multiples of this, except at sites that have too few of them.
            factored: whether the form "small" offers factors.
            price: what a choice takes of the budget. Fewer entries and bits are worth having in a menu by bytes only.
        """
        menus = []
        done = 0
        for site in self.sites if form == "factors" else units(self.sites):
            done += len(site.sites) if isinstance(site, Unit) else 1
            free = [each for each in members(site) if form == "small" and not each.dense_because]
            entries = {each.name: self.entries.options(each.name) for each in free}
            if isinstance(site, Unit):
                how = form == "plain" or not factored, multiple, chi_multiple
                menus.append(self.bonds.menu(site, topology, metric, *how, entries, price, self.entries.forms.fused))
            elif site.dense_because or form == "plain":
                menus.append(dense_menu(site, price))
            elif not factored:
                menus.append(envelope(site, entries.get(site.name, []), price))
            else:
                spectrum = np.asarray(self.factors(site.name, topology, metric).spectrum.numpy(), dtype=np.float64)
                options = nested_options(topology, metric, spectrum, site, self._max_chi)
                for other in (fitted or {}).get(site.name, ()):
                    options += self._fitted_options(site, other, metric, options)
                options += entries.get(site.name, [])
                menus.append(aligned(envelope(site, options, price), chi_multiple))
            progress(done)
        return Menu(tuple(menus))

    def _fitted_options(self, site: Site, topology: str, metric: str, nested: Sequence[Option]) -> list[Option]:
        """Returns `topology` fitted at every kept fraction of the grid; stops early if the first fit is too costly."""
        legs = resolve(topology, site.out_features, site.in_features)
        sizes = [choice_parameters(site, option.choice) for option in nested]
        options: list[Option] = []
        for kept in (_FIRST, *_GRID):
            chi = legs.largest_chi(min(int(kept * site.parameters), site.parameters - 1))
            if chi == 0 or any(option.choice == Choice(topology, chi, metric) for option in options):
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
        measured = self._measured
        calibrated = {} if key.metric == "plain" else {"statistics": measured.key, "shrinkage": measured.shrinkage}
        capped = {} if self._max_chi is None else {"max_chi": self._max_chi}
        fitted = {"chi": key.chi, "evaluations": key.evaluations, "tolerance": _TOLERANCE} if key.chi else {}
        cut = {"widths": key.widths} if key.widths else {}
        half = {"stored": "float16"} if self._stored == torch.float16 else {}
        return cache_key(
            format=FORMAT,
            weight=measured.digest(key.name),
            dtype=str(measured.weights[key.name].dtype),
            site=key.name,
            topology=key.topology,
            metric=key.metric,
            **calibrated,
            **capped,
            **fitted,
            **cut,
            **half,
        )

    def _build(self, key: _Key) -> Bundle:
        site = self._site[key.name]
        legs = resolve(key.topology, *site.shape(key.widths))
        if key.chi:
            return self._fit(key, legs)
        weight = self._measured.weights[key.name].detach()
        if key.widths:
            matrix = self.bonds.cut(key.name, key.widths)
            cores, spectrum = lowrank_cores(matrix.weight, matrix.inputs, matrix.gradients, self._max_chi)
        elif key.topology == "lowrank":
            inputs, gradients = self._metric(key.name, key.metric)
            cores, spectrum = lowrank_cores(weight, inputs, gradients, self._max_chi)
        else:
            cores, spectra = decompose(weight.float(), legs, self._max_chi)
            spectrum = spectra[0].closed()
        cores = truncate(cores, max(1, Legs(legs.out_legs, legs.in_legs, pivoted=True).break_even_chi))
        tensors = {f"core.{number}": core.to(self._stored).cpu() for number, core in enumerate(cores)}
        return Bundle({**tensors, "spectrum": spectrum.cpu()})

    def _fit(self, key: _Key, legs: Legs) -> Bundle:
        weight, moments = self._measured.weights[key.name].detach(), self._measured.moments(key.name, key.metric)
        identity = torch.eye(weight.shape[0], dtype=torch.float64, device=weight.device)
        inputs, gradients = (None if moment is None else shrink(moment, self._measured.shrinkage) for moment in moments)
        assert inputs is not None
        metrics = (identity if gradients is None else gradients)[None], inputs[None]
        result = fit(weight[None], *metrics, legs, key.chi, key.evaluations, _TOLERANCE)
        tensors = {f"core.{number}": core[0].cpu() for number, core in enumerate(result.cores)}
        return Bundle({**tensors, "spectrum": (2 * result.cost).sqrt().cpu()}, {"start": f"{float(result.start):.6g}"})

    def _metric(self, name: str, metric: str) -> list[torch.Tensor | None]:
        """C and G of a site, shrunk; None for those that the metric does not use."""
        shrinkage = self._measured.shrinkage
        return [None if each is None else shrink(each, shrinkage) for each in self._measured.moments(name, metric)]


def lowrank_cores(
    weight: torch.Tensor, inputs: torch.Tensor | None, gradients: torch.Tensor | None, max_chi: int | None
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Returns the cores (1, out, 1, χ) and (χ, 1, in, 1) of `lowrank` in a metric, and the whitened matrix's spectrum.

    All are float64. Slicing the bond gives the best matrix of every smaller rank.

    Args:
        weight: W (out, in).
        inputs, gradients: C (in, in) and G (out, out), positive definite; None leaves that side as it is.
        max_chi: largest χ; None for all.
    """
    left, right, values = lowrank(weight, inputs, gradients, max_chi)
    # Give each column and its row equal norms, whatever the metric, so that both stay within the range of float16.
    norms = left.norm(dim=0), right.norm(dim=1)
    share = (norms[1] / norms[0].where(norms[0] > 0, 1)).sqrt()
    left, right = left * share, right / share.where(share > 0, 1)[:, None]
    return [left[None, :, None, :], right[:, None, :, None]], values


def is_nested(topology: str, metric: str) -> bool:
    """Whether one decomposition serves every χ: `lowrank` in any metric, every MPO in the plain one."""
    return metric == "plain" or topology.removeprefix("pivoted-") == "lowrank"


@dataclass(frozen=True)
class _Key:
    """Identifies a decomposition or fit. χ is 0 if one decomposition serves every χ.

    The topology is without "pivoted-", because gauge fixing does not change the matrix.
    """

    name: str
    topology: str
    metric: str
    chi: int
    evaluations: int
    widths: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        name: str,
        topology: str,
        metric: str,
        chi: int,
        evaluations: int = _EVALUATIONS,
        widths: tuple[int, ...] = (),
    ) -> _Key:
        nested = is_nested(topology, metric)
        if widths and (not nested or metric != "two-sided"):
            raise Refusal(f"site {name}: a cut matrix can only be of low rank in the two-sided metric, got {topology}")
        if not nested and chi < 1:
            raise Refusal(f"site {name}: {topology} in the {metric} metric must be fitted for a χ ≥ 1, got {chi}")
        return cls(name, topology.removeprefix("pivoted-"), metric, 0 if nested else chi, evaluations, widths)
