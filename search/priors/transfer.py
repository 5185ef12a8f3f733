"""Transfers a prior to a model: the one it was made for or another one.

Knows the format of priors and menus; needs no model in memory. If the sites have the same names, shapes and bonds, the
schedule is that of the prior. Otherwise each site has donors: the prior's sites of the same family at the two nearest
relative depths. The donors' values are interpolated, and the Lagrangian projects the result exactly onto the budget.
Sites that a bond joins get one value, the mean of theirs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from compression.allocation.menu import Menu, SiteMenu
from compression.allocation.prices import departures
from compression.numerics.legs import resolve
from compression.numerics.packed_size import FLOATING
from compression.refusal import Refusal, nearest
from compression.schedule import Choice, Schedule
from compression.sites import Site, Unit, check_widths
from search.priors.format import Prior, PriorSite

__all__ = ["RULES", "Rule", "Transfer", "check_families", "exact_schedule", "fits", "transfer"]

Rule = Literal["price", "chi"]
_Field = Literal["offset", "relative_width", "relative_chi", "relative_density", "relative_bits"]
_RELATIVE: tuple[_Field, ...] = ("relative_width", "relative_chi", "relative_density", "relative_bits")
RULES: dict[str, str] = {
    "price": "the prior's price offsets from its closed form, applied to the target's own closed form",
    "chi": "the prior's relative χ, widths, densities and bits instead of the target's closed form",
}


@dataclass(frozen=True, eq=False)
class Transfer:
    """A prior that was transferred to a menu.

    Attributes:
        log_weights: logarithms of the factors on the costs of the menu's entries, in their order. With them, the closed
            form is the prior's schedule as closely as the menu and the budget allow. `envs.Problem.centred` takes them.
        notes: sentences that say how the prior was transferred.
    """

    log_weights: NDArray[np.float64]
    notes: tuple[str, ...]


def fits(prior: Prior, sites: Sequence[Site]) -> bool:
    """Return whether the prior names exactly these sites, with the same shapes, and they have the bonds it cuts."""
    own = {site.name: site for site in sites}
    return own.keys() == {site.name for site in prior.sites} and all(
        site.shape == own[site.name].shape() and (not site.bonds or _same_bonds(site, own[site.name]))
        for site in prior.sites
    )


def exact_schedule(prior: Prior, sites: Sequence[Site]) -> Schedule:
    """Return the prior's schedule in the order of the given sites.

    Raises:
        ValueError: a site is missing from the prior or the model, has another shape, cannot be tensorized here, or does
            not have the bond that the prior cuts or cannot be as narrow; or the prior does not cut all sites of a bond
            to the same width.
    """
    wanted = {site.name: site for site in prior.sites}
    for site in sites:
        if site.name not in wanted:
            raise Refusal(f"sites: the prior lacks {site.name}, which the model has")
        own, shape = wanted.pop(site.name), (site.out_features, site.in_features)
        if own.shape != shape:
            raise Refusal(f"sites: {site.name} must have shape {shape} as in the model, got {own.shape}")
        if site.dense_because and own.topology != "dense":
            raise Refusal(f"sites: {site.name} must stay dense here: {site.dense_because}")
        if own.bonds and not _same_bonds(own, site):
            names = ", ".join(f"{bond.name} ({bond.groups} groups, side {bond.side!r})" for bond in own.bonds)
            raise Refusal(
                f"sites: the prior cuts {site.name} by {names}, a bond that the model does not have or that "
                "--form factors leaves out"
            )
    if wanted:
        name = next(iter(wanted))
        raise Refusal(f"sites: the model has no {name}; the nearest is {nearest(name, [site.name for site in sites])}")
    choices = prior.schedule
    try:
        check_widths(sites, {site.name: choices[site.name].widths for site in sites})
    except Refusal as error:
        raise Refusal(f"sites: {error}") from None
    return Schedule(tuple((site.name, choices[site.name]) for site in sites))


def _same_bonds(own: PriorSite, site: Site) -> bool:
    bonds = own.bonds or ()
    return len(bonds) == len(site.cuts) and all(bond.fits(cut) for bond, cut in zip(bonds, site.cuts, strict=True))


def check_families(prior: Prior, sites: Sequence[Site], rule: Rule | None = None) -> None:
    """Refuse a prior without donors for any site of a model, before anything is calibrated.

    Raises:
        ValueError: the sites that can be tensorized have no family in common; `rule` is "price" and the prior has no
            offsets; or the prior cuts a bond at a site that has none here.
    """
    if rule == "price" and not _has_offsets(prior):
        raise Refusal("transfer must be chi for this prior, whose version has no offsets, got 'price'")
    ours, donors = {site.family for site in sites if not site.dense_because}, _donors(prior)
    if not ours & donors.keys():
        raise Refusal(
            f"sites: the prior's families {', '.join(sorted(donors))} and the model's {', '.join(sorted(ours))} have "
            "none in common"
        )
    blocks = _blocks(sites)
    for site in sites:
        if site.cuts or not _is_served(site, donors):
            continue
        width = _interpolated(donors[site.family], prior.blocks, _depth(site.block, blocks), "relative_width")
        if width < 1:
            raise Refusal(
                f"sites: a prior with widths is for a model that can take them, but no bond cuts {site.name} here, of "
                f"which the prior keeps {width:.2g}; the model has none there, or --form factors leaves it out"
            )


def transfer(prior: Prior, menu: Menu, rule: Rule | None = None) -> Transfer:
    """Return the weights that transfer a prior to a menu; they hold for any budget.

    Args:
        rule: how to transfer to a model with other sites, see `RULES`; None takes "price" if the prior has offsets,
            else "chi".

    Raises:
        ValueError: as `check_families`, or the prior has widths or factors of which the menu offers none.
    """
    sites = [site for options in menu.sites for site in options.sites]
    if fits(prior, sites):
        own = {site.name: site for site in prior.sites}
        wanted = [
            np.array([[getattr(own[site.name], field) for field in _RELATIVE] for site in options.sites])
            for options in menu.sites
        ]
        return Transfer(_by_chi(prior, menu, wanted), (f"all {len(sites)} sites have the prior's names and shapes",))
    rule = rule or ("price" if _has_offsets(prior) else "chi")
    check_families(prior, sites, rule)
    donors, blocks = _donors(prior), _blocks(sites)

    def values(options: SiteMenu, fields: Sequence[_Field]) -> NDArray[np.float64]:
        """The interpolated fields of the sites that have donors, (sites, fields); NaN for the others."""
        return np.array(
            [
                [
                    _interpolated(donors[site.family], prior.blocks, _depth(site.block, blocks), field)
                    if _is_served(site, donors)
                    else np.nan
                    for field in fields
                ]
                for site in options.sites
            ]
        )

    if rule == "price":
        weights = np.array([_mean(values(options, ("offset",))) for options in menu.sites])
    else:
        weights = _by_chi(prior, menu, [values(options, _RELATIVE) for options in menu.sites])
    served = np.array([_is_served(site, donors) for site in sites])
    return Transfer(weights, _notes(prior, sites, served, blocks, rule))


def _has_offsets(prior: Prior) -> bool:
    return all(site.offset is not None for site in prior.sites if site.dense_because is None)


def _donors(prior: Prior) -> dict[str, list[PriorSite]]:
    """Return the prior's sites that can be tensorized, by family."""
    donors: dict[str, list[PriorSite]] = defaultdict(list)
    for donor in prior.sites:
        if donor.dense_because is None:
            donors[donor.family].append(donor)
    return donors


def _is_served(site: Site, donors: Mapping[str, Sequence[PriorSite]]) -> bool:
    return site.family in donors and not site.dense_because


def _blocks(sites: Sequence[Site]) -> int:
    return 1 + max(site.block for site in sites)


def _depth(block: int, blocks: int) -> float:
    """Return the relative depth of a block: 0 for the first, 1 for the last, 0.5 for an only block."""
    return block / (blocks - 1) if blocks > 1 else 0.5


def _interpolated(donors: Sequence[PriorSite], blocks: int, depth: float, field: _Field) -> float:
    """Interpolate a field of the donors linearly at a depth, from the means over each block."""
    by_depth: dict[float, list[float]] = defaultdict(list)
    for donor in donors:
        value = getattr(donor, field)
        assert value is not None
        by_depth[_depth(donor.block, blocks)].append(value)
    depths = sorted(by_depth)
    return float(np.interp(depth, depths, [np.mean(by_depth[one]) for one in depths]))


def _mean(values: NDArray[np.float64]) -> float:
    """Return the mean of the values that are known; 0 if none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else 0.0


def _by_chi(prior: Prior, menu: Menu, wanted: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return the departures of the options nearest to what is wanted; 0 where nothing is known.

    Args:
        wanted: relative width, χ, density and bits of the sites of every entry of the menu, (sites, 4); NaN if unknown.
    """
    _check_form(prior, menu)
    known = np.array([not np.isnan(values).all() for values in wanted])
    indices = np.array(
        [
            int(np.argmin(np.nansum((_options(options) - values) ** 2, axis=(1, 2)))) if given else -1
            for options, values, given in zip(menu.sites, wanted, known, strict=True)
        ],
        dtype=np.int64,
    )
    # Sites without a donor get what the closed form of the whole menu gives them.
    part = Menu(tuple(options for options, given in zip(menu.sites, known, strict=True) if given))
    weights = np.zeros(len(wanted))
    weights[known] = departures(part, indices[known])
    return weights


def _check_form(prior: Prior, menu: Menu) -> None:
    """Refuse a prior with widths, factors, pruned or rounded matrices for a menu that offers none."""
    if prior.has_widths and not any(isinstance(options.site, Unit) for options in menu.sites):
        raise Refusal("the prior has widths, and the menu offers factors alone; take --form any, or another prior")
    offers = [
        choice
        for options in menu.sites
        for index in range(len(options.choices))
        for _, choice in options.assigned(index)
    ]
    if any(site.entries for site in prior.sites) and not any(choice.is_sparse for choice in offers):
        raise Refusal("the prior has pruned matrices, and the menu offers none; take --form small, or another prior")
    if any(site.bits for site in prior.sites) and not any(choice.bits for choice in offers):
        raise Refusal(
            "the prior has rounded matrices, and the menu offers none; take --form small without --matrix-bits 16, or "
            "another prior"
        )
    if any(site.chi for site in prior.sites) and not any(choice.is_factored for choice in offers):
        raise Refusal("the prior has factors, and the menu offers widths alone; take --form any, or another prior")


def _options(options: SiteMenu) -> NDArray[np.float64]:
    """Return relative width, χ, density and bits of the sites under every option, (options, sites, 4)."""
    return np.array(
        [
            [_relative(site, choice) for site, (_, choice) in zip(options.sites, options.assigned(index), strict=True)]
            for index in range(len(options.choices))
        ]
    )


def _relative(site: Site, choice: Choice) -> tuple[float, float, float, float]:
    width = prod(width / cut.groups for cut, width in zip(site.cuts, choice.widths, strict=False))
    bits = (choice.bits or FLOATING) / FLOATING
    if choice.is_sparse:
        return width, 1.0, choice.chi / site.parameters, bits
    if not choice.is_factored:
        return width, 1.0, 1.0, bits
    return width, choice.chi / max(resolve(choice.topology, *site.shape(choice.widths)).full_bonds), 1.0, bits


def _notes(prior: Prior, sites: Sequence[Site], served: NDArray[np.bool_], blocks: int, rule: Rule) -> tuple[str, ...]:
    families = sorted({site.family for site, given in zip(sites, served, strict=True) if given})
    notes = [
        f"{prior.model.id}, {prior.blocks} blocks, to {blocks} blocks: {int(served.sum())} of {len(sites)} sites take "
        f"{RULES[rule]}, by family ({', '.join(families)}) and relative depth",
    ]
    if rest := [site for site, given in zip(sites, served, strict=True) if not given]:
        others = sorted({site.family for site in rest})
        notes.append(f"{len(rest)} sites of {', '.join(others)} have no donor and keep the closed form")
    return tuple(notes)
