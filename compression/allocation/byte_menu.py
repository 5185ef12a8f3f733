"""Builds menus by bytes: for every site, each χ and the dense matrix with 16, 8 or 4 bits per number, and pruned ones.

Uses NumPy only; does not know weights. The predicted cost of an option is the cost of truncation (see
`compression.allocation.menu`) plus the cost of rounding, ½·tr(G E C Eᵀ) for the rounding error E. The caller measures
the cost of rounding for the dense matrix, and for one χ on behalf of all: there it is expressed per unit of
½·tr(G Ŵ C Ŵᵀ), and scales with what each χ retains of the whitened matrix. A pruned matrix costs what
`compression.numerics.pruning` says; it has 16 bits per number, and a bit per entry that says which are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from compression.allocation.menu import SiteMenu
from compression.numerics.bitmask import bitmask_bytes
from compression.numerics.group_integers import packed_bytes
from compression.numerics.legs import resolve
from compression.refusal import Refusal
from compression.schedule import DENSE, SPARSE, Choice
from compression.sites import Site

__all__ = ["PLAIN", "ByteMenu", "Noise", "byte_menu", "choice_bytes"]

PLAIN = 16
_TOPOLOGY, _METRIC = "pivoted-lowrank", "two-sided"


@dataclass(frozen=True)
class Noise:
    """Holds the cost of rounding to some number of bits at one site.

    Attributes:
        dense: ½·tr(G E C Eᵀ) for the rounding error E of the dense matrix, in nats per token.
        share: ½·tr(G E C Eᵀ) for the rounding error E of a low-rank matrix Ŵ, divided by ½·tr(G Ŵ C Ŵᵀ).
    """

    dense: float
    share: float


@dataclass(frozen=True, eq=False)
class ByteMenu:
    """Lists the options of one site in ascending order of bytes.

    Attributes:
        menu: the options, with bytes instead of parameters; the last option is dense with 16 bits.
        bits: bits per number of every option: 16, 8 or 4.
    """

    menu: SiteMenu
    bits: tuple[int, ...]


def choice_bytes(site: Site, choice: Choice, bits: int, group: int) -> int:
    """Returns the bytes of a site as it is stored: numbers, scales, 4 bytes for every row index, and masks.

    Raises:
        ValueError: a pruned matrix is to have fewer than 16 bits per number.
    """
    if choice.is_sparse:
        if bits != PLAIN:
            raise Refusal(f"a pruned matrix must have {PLAIN} bits per number, got {bits}")
        return 2 * choice.chi + bitmask_bytes(site.out_features, site.in_features)
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
    site: Site,
    spectrum: NDArray[np.float64],
    noise: Mapping[int, Noise],
    group: int,
    tensorized: bool = True,
    pruned: Mapping[int, float] = MappingProxyType({}),
) -> ByteMenu:
    """Returns the menu of options that no other option beats in both bytes and cost.

    Args:
        site: the site.
        spectrum: singular values of the whitened matrix, descending.
        noise: cost of rounding, by bits. Bits that are missing are not offered, except 16, which costs nothing.
        group: numbers in a row that share a scale.
        tensorized: whether to offer χ; otherwise only dense and pruned matrices are offered.
        pruned: predicted cost of the pruned matrices to offer, by the number of their entries.
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
    for entries, cost in pruned.items():
        choice = Choice(SPARSE, entries, _METRIC)
        options.append((choice_bytes(site, choice, PLAIN, group), cost, choice, PLAIN))
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
