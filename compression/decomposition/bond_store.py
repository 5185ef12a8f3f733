"""Cuts the bonds between the matrices of one model: the order of elimination, what is left at a width, and joint menus.

Combines the elimination of bonds with weights, metrics and the cache. Does not know the model they come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from compression.allocation.menu import Option, SiteMenu
from compression.decomposition.joint_menu import joint_menu, multiple_of, spectra, widths_of
from compression.decomposition.measured import Matrix, Measured
from compression.numerics.elimination import Elimination, eliminate, refit
from compression.refusal import Refusal
from compression.sites import Cut, Site, Unit, units
from compression.size import Price, choice_parameters
from compression.storage.factor_cache import Bundle, FactorCache
from compression.storage.limited import LimitedBundles

__all__ = ["BondStore"]

_FORMAT, _STEPS = 2, 128
"""Part of the cache keys of what is made here, and the number of steps that eliminate all groups of a long bond."""
_HEADS = 2.0
"""Factor on the predicted costs of removing groups of several values, as heads are, in menus. A head does more damage
than its cost says, beside that of other options: on search text, the KL of the closed form of SmolLM2-135M fell by 3 %
at kept 0.8 and by 6 % at 0.6 when no head could be removed, and by as much with this factor."""


class BondStore:
    """Cuts the bonds between the sites of one model on demand, and caches what is left.

    Args:
        sites: the sites of the model with their cuts.
        measured: their weights and metrics.
        cache: stores the results.
        limited: stores the refitted matrices.
        stored: type in which they are stored.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        measured: Measured,
        cache: FactorCache,
        limited: LimitedBundles,
        stored: torch.dtype = torch.float32,
    ) -> None:
        self._measured = measured
        self._cache = cache
        self._limited = limited
        self._stored = stored
        self._site = {site.name: site for site in sites}
        self._unit = {unit.name: unit for unit in units(sites) if isinstance(unit, Unit)}
        self._eliminations: dict[str, Elimination] = {}

    def elimination(self, bond: str) -> Elimination:
        """Returns the order in which the groups of a bond are removed, and what each width costs.

        Raises:
            ValueError: no site has this bond.
        """
        if bond not in self._unit:
            raise Refusal(f"no bond is called {bond!r}")
        if bond not in self._eliminations:
            reader, cut = self._reader(bond)
            key = self._measured.key_of(reader.name, kind="elimination", format=_FORMAT, groups=cut.groups)

            def build() -> Bundle:
                matrix, step = self._measured.matrix(reader.name), max(1, cut.groups // _STEPS)
                found = eliminate(matrix.weight, matrix.inputs, matrix.gradients, cut.size, step)
                return Bundle({"order": found.order, "cost": found.cost})

            tensors = self._cache.get_or_build(key, build).tensors
            self._eliminations[bond] = Elimination(tensors["order"], tensors["cost"])
        return self._eliminations[bond]

    def kept(self, name: str, widths: tuple[int, ...]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Returns the numbers of the rows and of the columns of a site that are left at these widths of its bonds.

        They ascend; None if all are left because no bond cuts that side.
        """
        rows = columns = None
        for cut, width in zip(self._site[name].cuts, widths, strict=bool(widths)):
            left = cut.indices(self.elimination(cut.bond).kept(width))
            rows, columns = (left, columns) if cut.of_rows else (rows, left)
        return rows, columns

    def plain(self, name: str, widths: tuple[int, ...]) -> torch.Tensor:
        """Returns the matrix of a site whose bonds are cut to `widths`, float32 on the device of the weight.

        A site that writes the bond loses rows. One that reads it is refitted to the columns that are left, and rounded
        to the type in which it is stored.
        """
        weight = self._measured.weights[name].detach()
        rows, columns = self.kept(name, widths)
        if columns is None:
            return weight.float() if rows is None else weight[rows.to(weight.device)].float()
        parts = {} if self._stored == torch.float32 else {"stored": str(self._stored)}
        key = self._measured.key_of(name, kind="refit", format=_FORMAT, widths=widths, **parts)

        def build() -> Bundle:
            matrix = self._measured.matrix(name)
            return Bundle({"weight": refit(matrix.weight, matrix.inputs, columns).to(self._stored).cpu()})

        bundle = self._limited.get_or_build(key, build)
        return bundle.tensors["weight"].to(weight.device).float()

    def cut(self, name: str, widths: tuple[int, ...]) -> Matrix:
        """Returns the matrix of a site whose bonds are cut to `widths`, with the metric of what is left."""
        matrix = self._measured.matrix(name)
        rows, columns = (None if left is None else left.to(matrix.weight.device) for left in self.kept(name, widths))
        weight, inputs, gradients = matrix.weight, matrix.inputs, matrix.gradients
        if columns is not None:
            weight, inputs = refit(weight, inputs, columns), inputs[columns][:, columns]
        if rows is not None:
            weight, gradients = weight[rows], gradients[rows][:, rows]
        return Matrix(weight, inputs, gradients)

    def menu(
        self,
        unit: Unit,
        topology: str,
        metric: str,
        plain: bool,
        multiple: int | None,
        chi_multiple: int = 1,
        entries: Mapping[str, Sequence[Option]] = MappingProxyType({}),
        price: Price = choice_parameters,
        fused: bool = False,
    ) -> SiteMenu:
        """Returns the options of a unit: every width of its bond, with every χ of what is left unless `plain`.

        Their costs are predictions, but that of removing heads is doubled.

        Args:
            topology, metric: of the decompositions.
            multiple: as for `compression.decomposition.joint_menu.multiple_of`.
            chi_multiple, entries, price, fused: as for `compression.decomposition.joint_menu.joint_menu`.
        """
        elimination, (reader, cut) = self.elimination(unit.name), self._reader(unit.name)
        step = multiple_of(unit, multiple, self._measured.weights[reader.name].device.type)
        cost = elimination.cost.numpy() * (1.0 if cut.size == 1 else _HEADS)
        if plain:
            return joint_menu(unit, cost, {}, topology, metric, step, entries=entries, price=price, fused=fused)
        names, widths = [site.name for site in unit.sites], widths_of(cut.groups, step)

        def build() -> Bundle:
            sides: tuple[dict[str, Matrix], dict[str, Matrix]] = ({}, {})
            for site in unit.sites:
                sides[site is reader][site.name] = self._measured.matrix(site.name, site.cuts[0].size)
            found = spectra(elimination, *sides, widths)
            return Bundle({f"{name}/{width}": values.cpu() for (name, width), values in found.items()})

        key = self._measured.key_of(*names, kind="joint spectra", format=_FORMAT, widths=widths)
        tensors = self._cache.get_or_build(key, build).tensors
        spectrum = {(name, width): tensors[f"{name}/{width}"].numpy() for name in names for width in widths}
        return joint_menu(unit, cost, spectrum, topology, metric, step, chi_multiple, entries, price, fused)

    def _reader(self, bond: str) -> tuple[Site, Cut]:
        """The site that reads a bond, and how the bond cuts it."""
        return next(
            (site, cut) for site in self._unit[bond].sites for cut in site.cuts if cut.bond == bond and not cut.of_rows
        )
