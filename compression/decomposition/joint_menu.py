"""Builds the menu of a unit: every width of its bond, together with every χ of the matrices that the bond leaves.

Takes weights and moments; does not know models or files. After a bond is cut to a width, its reader is the refitted
matrix in the metric of the kept hidden values, and its writers are the rows that write them. The error of the cut and
that of decomposing the refitted reader are orthogonal in the metric, so their predicted costs add up exactly.

The hidden values are ordered from the last one that the elimination removes to the first. In that order the Cholesky
factor of C for a width is the leading block of the factor for the full width, so the whitened reader at a width is the
first columns of the whitened reader at full width, and one factorization serves every width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, lcm
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from compression.allocation.menu import FEWEST, Option, SiteMenu, convex_hull, envelope, tail_costs, undominated
from compression.decomposition.measured import Matrix
from compression.numerics.elimination import Elimination, indices_of
from compression.numerics.large_moments import brief_cholesky, brief_product
from compression.numerics.legs import resolve
from compression.schedule import Choice, Joint
from compression.sites import Site, Unit
from compression.size import Price, choice_parameters

__all__ = ["joint_menu", "multiple_of", "spectra", "widths_of"]

_WIDTHS, _DENSER = 12, 1.6
"""Number of widths at which the matrices of a bond are also decomposed, and the power by which they lie closer to each
other near the full width. On four MLPs of SmolLM2-135M, 48 even widths lowered the predicted cost by 2 % at most."""
_PLAIN = 96
"""Number of widths that are offered without decomposing anything."""
_ALIGNED = {"cpu": 16, "cuda": 64}
"""Entries whose multiples a device multiplies fast, by type of device."""


def multiple_of(unit: Unit, multiple: int | None, device: str) -> int:
    """Returns the number of groups whose multiples are the widths of a unit.

    Args:
        multiple: rows and columns are to be multiples of this; None means the largest power of two that the device
            multiplies fast and that still leaves a choice of widths.
        device: type of the device, such as "cpu".
    """
    sizes = {each.size for site in unit.sites for each in site.cuts}
    wanted = _ALIGNED.get(device, 1) if multiple is None else multiple
    while True:
        groups = lcm(*(wanted // gcd(wanted, size) for size in sizes))
        if multiple is not None or groups == 1 or unit.groups // groups >= _WIDTHS:
            return groups
        wanted //= 2


def widths_of(groups: int, multiple: int = 1) -> list[int]:
    """Returns the widths at which matrices are decomposed: the full one and multiples of `multiple`, ascending."""
    wanted = (groups * (1 - (number / _WIDTHS) ** _DENSER) for number in range(_WIDTHS))
    return sorted({groups, *(rounded for width in wanted if (rounded := int(width / multiple) * multiple))})


def _plain_widths(groups: int, multiple: int) -> list[int]:
    """Returns the widths that are offered without factors: the full one and multiples of `multiple`."""
    steps = groups // multiple
    return sorted({groups, *(multiple * max(1, round(steps * n / _PLAIN)) for n in range(1, _PLAIN + 1) if steps)})


@torch.no_grad()
def spectra(
    elimination: Elimination, writers: Mapping[str, Matrix], reader: Mapping[str, Matrix], widths: Sequence[int]
) -> dict[tuple[str, int], torch.Tensor]:
    """Returns the singular values of every whitened matrix of a bond at every width, float64, descending.

    Args:
        elimination: the elimination of the bond.
        writers: the matrices that write the bond, by name.
        reader: the one matrix that reads it, by name.
        widths: widths of at least 1.
    """
    found: dict[tuple[str, int], torch.Tensor] = {}
    order = elimination.order.flip(0)  # the last to be removed comes first
    [(name, matrix)] = reader.items()
    white = _whitened_reader(matrix, order).mT
    for width, gram in zip(widths, _grams(white, None, [width * matrix.size for width in widths]), strict=True):
        found[name, width] = _roots(gram, width * matrix.size)
    for name, matrix in writers.items():
        rows = indices_of(order, matrix.size).to(matrix.weight.device)
        white = matrix.weight[rows] @ torch.linalg.cholesky(matrix.inputs.double())
        gradients, counts = matrix.gradients[rows][:, rows], [width * matrix.size for width in widths]
        for width, gram in zip(widths, _grams(white, gradients, counts), strict=True):
            found[name, width] = _roots(gram, width * matrix.size)
    return found


def _grams(rows: torch.Tensor, metric: torch.Tensor | None, counts: Sequence[int]) -> Iterator[torch.Tensor]:
    """Yields XᵀMX for the first rows X of a matrix (all, columns), by ascending counts of rows.

    Args:
        metric: (all, all), of which M is the leading block; None means the identity.
    """
    gram, start = rows.new_zeros(rows.shape[1], rows.shape[1]), 0
    for count in counts:
        new = rows[start:count]
        if metric is None:
            gram = gram + new.mT @ new
        else:  # the new rows among each other, and with the earlier ones
            inner = new.mT @ brief_product(metric[start:count, start:count], new)
            outer = new.mT @ brief_product(metric[start:count, :start], rows[:start])
            gram = gram + inner + outer + outer.mT
        start = count
        yield gram


def _whitened_reader(matrix: Matrix, order: torch.Tensor) -> torch.Tensor:
    """Returns Rᵀ W L (out, in) of the reader with its columns in the order of the groups, see the module; float64."""
    columns = indices_of(order, matrix.size).to(matrix.weight.device)
    left, right = torch.linalg.cholesky(matrix.gradients.double()), brief_cholesky(matrix.inputs[columns][:, columns])
    white: torch.Tensor = (left.mT @ matrix.weight[:, columns]).to(right) @ right
    return white.double()


def joint_menu(
    unit: Unit,
    cost: NDArray[np.float64],
    spectrum: Mapping[tuple[str, int], NDArray[np.float64]],
    topology: str,
    metric: str,
    multiple: int = 1,
    chi_multiple: int = 1,
    entries: Mapping[str, Sequence[Option]] = MappingProxyType({}),
    price: Price = choice_parameters,
    fused: bool = False,
) -> SiteMenu:
    """Returns the undominated options of a unit.

    At each width with spectra, the χ of the matrices follow the gain per parameter that they have in common, from the
    smallest to the largest; other combinations lie above the convex hull of these. Other widths are offered without
    factors. Pruned and rounded matrices are options beside χ at the full width.

    Args:
        unit: the unit; all its sites are cut by the same bond alone.
        cost: predicted cost of every width of the bond, nats per token (groups + 1,).
        spectrum: singular values by site name and width, see `spectra`; empty to offer widths without factors only.
        topology, metric: of the decompositions.
        multiple: number of groups whose multiples are offered as widths.
        chi_multiple: number whose multiples are offered as χ, at matrices that have enough of them.
        entries: by site name, the forms that keep its entries in fewer bytes.
        price: what a choice takes of the budget.
        fused: whether all matrices that write the bond have the same bits.
    """
    groups = len(cost) - 1
    least = {0} if all(cut.least == 0 for site in unit.sites for cut in site.cuts) else set[int]()
    widths = sorted({*least, *_plain_widths(groups, multiple), *(width for _, width in spectrum)})
    parts = _parts(unit, fused)
    paths = []
    for width in widths:
        cut = (width,) if width < groups else ()
        offered: dict[str, list[Option]] = {}
        for site in unit.sites:
            options = [Option(Choice("dense", 0, "none", cut), 0.0)]
            if (values := spectrum.get((site.name, width))) is not None:
                options += _factored(site, cut, topology, metric, values, chi_multiple)
            if not cut:
                options += entries.get(site.name, ())
            offered[site.name] = options
        paths.append(_path([_curve(part, _together(part, offered), price) for part in parts]))
    sizes = np.concatenate([path.sizes.sum(axis=1) for path in paths])
    costs = np.concatenate([cost[width] + path.costs.sum(axis=1) for width, path in zip(widths, paths, strict=True)])
    choices = np.concatenate([path.choices for path in paths])
    order = [unit.sites.index(site) for part in parts for site in part]

    def joint(chosen: NDArray[np.object_]) -> Joint:
        each = [choice for together in chosen for choice in together]
        return Joint(tuple(each[order.index(number)] for number in range(len(order))))

    options = [Option(joint(choices[index]), float(costs[index])) for index in undominated(sizes, costs)]
    return envelope(unit, options, price)


@dataclass(frozen=True, eq=False)
class _Curve:
    """Options with what they take of the budget and cost, ascending in what they take.

    Each array has an axis of options, and behind it, if it describes several parts of a unit, one of parts. A choice is
    a tuple with one for every matrix of its part.
    """

    sizes: NDArray[np.int64]
    costs: NDArray[np.float64]
    choices: NDArray[np.object_]


def _factored(
    site: Site, cut: tuple[int, ...], topology: str, metric: str, spectrum: NDArray[np.float64], multiple: int
) -> list[Option]:
    """Returns the χ that are offered for what is left of one matrix."""
    tail = tail_costs(spectrum)
    last = min(resolve(topology, *site.shape(cut)).break_even_chi, len(spectrum))
    chis = range(1, last + 1) if last < FEWEST * multiple else range(multiple, last + 1, multiple)
    return [Option(Choice(topology, chi, metric, cut), float(tail[chi])) for chi in chis]


def _parts(unit: Unit, fused: bool) -> list[tuple[Site, ...]]:
    """Returns the matrices of a unit in the groups that must have the same bits."""
    together = tuple(site for site in unit.sites if fused and all(cut.of_rows for cut in site.cuts))
    alone: list[tuple[Site, ...]] = [(site,) for site in unit.sites if site not in together]
    return [together, *alone] if together else alone


def _together(part: Sequence[Site], offered: Mapping[str, Sequence[Option]]) -> list[tuple[tuple[Choice, ...], float]]:
    """Returns the choices of a part and their cost: all of a matrix alone, of several those with the same bits."""
    tables: list[dict[object, tuple[Choice, float]]] = []
    for site in part:
        table: dict[object, tuple[Choice, float]] = {}
        for option in offered[site.name]:
            assert isinstance(option.choice, Choice)
            table[option.choice.bits if len(part) > 1 else option.choice] = option.choice, option.cost
        tables.append(table)
    shared = [key for key in tables[0] if all(key in table for table in tables)]
    found = [[table[key] for table in tables] for key in shared]
    return [(tuple(choice for choice, _ in each), sum(cost for _, cost in each)) for each in found]


def _curve(part: Sequence[Site], options: Sequence[tuple[tuple[Choice, ...], float]], price: Price) -> _Curve:
    """Returns the options of a part that lie on the lower convex hull of cost over what they take."""
    sized = sorted(
        ((sum(map(price, part, choices)), cost, choices) for choices, cost in options), key=lambda one: one[:2]
    )
    sizes, costs = np.array([one[0] for one in sized], dtype=np.int64), np.array([one[1] for one in sized])
    new = np.flatnonzero(np.diff(sizes, prepend=-1))  # of options of one size, the cheapest
    kept = new[convex_hull(sizes[new], costs[new])]
    choices = np.empty(len(sized), dtype=object)
    choices[:] = [one[2] for one in sized]
    return _Curve(sizes[kept], costs[kept], choices[kept])


def _path(curves: Sequence[_Curve]) -> _Curve:
    """Returns the options of several parts together; every step takes the one that pays most per parameter."""
    gains = [np.diff(curve.costs) / np.diff(curve.sizes) for curve in curves]
    owner = np.repeat(np.arange(len(curves)), [len(each) for each in gains])[
        np.argsort(np.concatenate(gains), kind="stable")
    ]
    taken = [np.append(0, np.cumsum(owner == number)) for number in range(len(curves))]
    pairs = list(zip(curves, taken, strict=True))
    return _Curve(
        np.stack([curve.sizes[index] for curve, index in pairs], axis=1),
        np.stack([curve.costs[index] for curve, index in pairs], axis=1),
        np.stack([curve.choices[index] for curve, index in pairs], axis=1),
    )


def _roots(gram: torch.Tensor, rows: int) -> torch.Tensor:
    """Singular values of a matrix of so many rows from its Gram matrix; in float64 down to 1e-8 of the largest."""
    values: torch.Tensor = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()
    return values[:rows]
