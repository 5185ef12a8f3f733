"""Menus by bytes: per site, every χ and the dense matrix in 16, 8 or 4 bits a number, so that bytes decide.

NumPy values only. The predicted cost of an option is what truncation costs (see `compression.allocation.menu`) plus
what rounding costs, ½·tr(G E C Eᵀ) of an actual rounding error E, measured by the caller: of the dense matrix for
itself, and at one χ for all, where it is counted per unit of what that χ retains of the whitened matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compression.allocation.menu import SiteMenu
from compression.numerics.group_integers import packed_bytes
from compression.numerics.legs import resolve
from compression.schedule import DENSE, Choice
from compression.sites import Site

__all__ = ["PLAIN", "ByteMenu", "Noise", "byte_menu", "choice_bytes"]

PLAIN = 16
_TOPOLOGY, _METRIC = "pivoted-lowrank", "two-sided"


@dataclass(frozen=True)
class Noise:
    """What rounding to some number of bits costs at one site.

    Attributes:
        dense: ½·tr(G E C Eᵀ) of the rounded dense matrix.
        share: the same of a rounded low rank, over ½·tr(G Ŵ C Ŵᵀ) of the low rank itself.
    """

    dense: float
    share: float


@dataclass(frozen=True, eq=False)
class ByteMenu:
    """Options of one site by ascending bytes.

    Attributes:
        menu: with bytes in the place of parameters; the last option is dense in 16 bits.
        bits: of every option: 16, 8 or 4.
    """

    menu: SiteMenu
    bits: tuple[int, ...]


def choice_bytes(site: Site, choice: Choice, bits: int, group: int) -> int:
    """Bytes of a site as it is stored: numbers, scales, and 4 for every row place."""
    stored: tuple[tuple[int, int], ...]
    if choice.is_dense:
        stored = ((site.out_features, site.in_features),)
    else:
        stored = ((site.out_features - choice.chi, choice.chi), (choice.chi, site.in_features))
    places = 0 if choice.is_dense else 4 * choice.chi
    if bits == PLAIN:
        return places + sum(2 * rows * columns for rows, columns in stored)
    return places + sum(packed_bytes(rows, columns, bits, group) for rows, columns in stored)


def byte_menu(
    site: Site, spectrum: NDArray[np.float64], noise: Mapping[int, Noise], group: int, tensorized: bool = True
) -> ByteMenu:
    """The options that no other one beats in bytes and cost.

    Args:
        spectrum: singular values of the whitened matrix, descending.
        noise: by bits; what is not in it is not offered. 16 bits cost nothing.
        tensorized: whether χ is offered, or the dense matrix only.
    """
    energy = 0.5 * np.cumsum(np.square(spectrum))
    last = resolve(_TOPOLOGY, site.out_features, site.in_features).break_even_chi if tensorized else 0
    options: list[tuple[int, float, Choice, int]] = []
    for bits in (PLAIN, *noise):
        rounding = noise.get(bits, Noise(0.0, 0.0))
        options.append((choice_bytes(site, DENSE, bits, group), rounding.dense, DENSE, bits))
        for chi in range(1, min(last, len(spectrum)) + 1):
            choice = Choice(_TOPOLOGY, chi, _METRIC)
            cost = float(energy[-1] - energy[chi - 1] + rounding.share * energy[chi - 1])
            options.append((choice_bytes(site, choice, bits, group), cost, choice, bits))
    dense = choice_bytes(site, DENSE, PLAIN, group)
    kept: list[tuple[int, float, Choice, int]] = []
    for option in sorted(options, key=lambda option: (option[0], option[1])):
        if option[0] < dense and (not kept or (option[0] > kept[-1][0] and option[1] < kept[-1][1])):
            kept.append(option)
    kept.append((dense, 0.0, DENSE, PLAIN))
    sizes, costs, choices, bits_of = zip(*kept, strict=True)
    numbers = np.array(sizes, dtype=np.int64)
    menu = SiteMenu(site, choices, numbers, np.maximum(np.array(costs, dtype=np.float64), 0.0), numbers)
    return ByteMenu(menu, bits_of)
