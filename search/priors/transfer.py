"""Transfers a prior to a model: the one it was made for or another one.

Knows the format of priors and menus; needs no model in memory. If the sites have the same names and shapes, the
schedule is that of the prior. Otherwise each site has donors: the prior's sites of the same family at the two nearest
relative depths. The donors' values are interpolated, and the Lagrangian projects the result exactly onto the budget.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from compression.allocation.menu import Menu, SiteMenu
from compression.allocation.prices import departures
from compression.numerics.legs import resolve
from compression.refusal import Refusal, nearest
from compression.schedule import Schedule
from compression.sites import Site
from search.priors.format import Prior, PriorSite

__all__ = ["RULES", "Rule", "Transfer", "check_families", "exact_schedule", "fits", "transfer"]

Rule = Literal["price", "chi"]
RULES: dict[str, str] = {
    "price": "the prior's price offsets from its closed form, applied to the target's own closed form",
    "chi": "the prior's relative χ instead of the target's closed form",
}


@dataclass(frozen=True, eq=False)
class Transfer:
    """A prior that was transferred to a menu.

    Attributes:
        log_weights: logarithms of the factors on the sites' costs, shape (sites,). With them, the closed form is the
            prior's schedule as closely as the menu and the budget allow. `envs.Problem.centred` takes them.
        notes: sentences that say how the prior was transferred.
    """

    log_weights: NDArray[np.float64]
    notes: tuple[str, ...]


def fits(prior: Prior, sites: Sequence[Site]) -> bool:
    """Return whether the prior names exactly these sites, with the same shapes."""
    return {site.name: site.shape for site in prior.sites} == {
        site.name: (site.out_features, site.in_features) for site in sites
    }


def exact_schedule(prior: Prior, sites: Sequence[Site]) -> Schedule:
    """Return the prior's schedule in the order of the given sites.

    Raises:
        ValueError: a site is missing from the prior or the model, has another shape, or cannot be tensorized here.
    """
    wanted = {site.name: site for site in prior.sites}
    for site in sites:
        if site.name not in wanted:
            raise Refusal(f"sites: the prior lacks {site.name}, which the model has")
        own, shape = wanted.pop(site.name), (site.out_features, site.in_features)
        if own.shape != shape:
            raise Refusal(f"sites: {site.name} must have shape {shape} as in the model, got {own.shape}")
        if site.dense_because and own.chi is not None:
            raise Refusal(f"sites: {site.name} must stay dense here: {site.dense_because}")
    if wanted:
        name = next(iter(wanted))
        raise Refusal(f"sites: the model has no {name}; the nearest is {nearest(name, [site.name for site in sites])}")
    choices = prior.schedule
    return Schedule(tuple((site.name, choices[site.name]) for site in sites))


def check_families(prior: Prior, sites: Sequence[Site], rule: Rule | None = None) -> None:
    """Refuse a prior without donors for any site of a model, before anything is calibrated.

    Raises:
        ValueError: the sites that can be tensorized have no family in common, or `rule` is "price" and the prior has no
            offsets.
    """
    if rule == "price" and not _has_offsets(prior):
        raise Refusal("transfer must be chi for this prior, whose version has no offsets, got 'price'")
    ours, theirs = {site.family for site in sites if not site.dense_because}, _donors(prior).keys()
    if not ours & theirs:
        raise Refusal(
            f"sites: the prior's families {', '.join(sorted(theirs))} and the model's {', '.join(sorted(ours))} have "
            "none in common"
        )


def transfer(prior: Prior, menu: Menu, rule: Rule | None = None) -> Transfer:
    """Return the weights that transfer a prior to a menu; they hold for any budget.

    Args:
        rule: how to transfer to a model with other sites, see `RULES`; None takes "price" if the prior has offsets,
            else "chi".

    Raises:
        ValueError: the families have none in common, or `rule` is "price" and the prior has no offsets.
    """
    sites = [site for options in menu.sites for site in options.sites]
    if len(sites) > len(menu.sites):
        raise Refusal("a prior without widths cannot start a search over widths; leave out --prior")
    if fits(prior, sites):
        own = {site.name: site.relative_chi for site in prior.sites}
        wanted = np.array([own[site.name] for site in sites])
        return Transfer(_by_chi(menu, wanted), (f"all {len(sites)} sites have the prior's names and shapes",))
    rule = rule or ("price" if _has_offsets(prior) else "chi")
    check_families(prior, sites, rule)
    donors = _donors(prior)
    served = np.array([site.family in donors and not site.dense_because for site in sites])
    blocks = 1 + max(site.block for site in sites)
    values = np.full(len(sites), np.nan)
    for number, site in enumerate(sites):
        if served[number]:
            values[number] = _interpolated(donors[site.family], prior.blocks, _depth(site.block, blocks), rule)
    weights = np.where(served, values, 0.0) if rule == "price" else _by_chi(menu, values)
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


def _depth(block: int, blocks: int) -> float:
    """Return the relative depth of a block: 0 for the first, 1 for the last, 0.5 for an only block."""
    return block / (blocks - 1) if blocks > 1 else 0.5


def _interpolated(donors: Sequence[PriorSite], blocks: int, depth: float, rule: Rule) -> float:
    """Interpolate the donors' offset or relative χ linearly at a depth, from the means over each block."""
    by_depth: dict[float, list[float]] = defaultdict(list)
    for donor in donors:
        value = donor.relative_chi if rule == "chi" else donor.offset
        assert value is not None
        by_depth[_depth(donor.block, blocks)].append(value)
    depths = sorted(by_depth)
    return float(np.interp(depth, depths, [np.mean(by_depth[one]) for one in depths]))


def _by_chi(menu: Menu, wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the departures of the options whose relative χ is nearest to the wanted one; 0 where that is NaN."""
    known = ~np.isnan(wanted)
    indices = np.array(
        [
            int(np.argmin(np.abs(_relative(options) - value))) if value == value else len(options.choices) - 1
            for options, value in zip(menu.sites, wanted, strict=True)
        ],
        dtype=np.int64,
    )
    if known.all():
        return departures(menu, indices)
    # Sites without a donor get what the closed form of the whole menu gives them.
    part = Menu(tuple(options for options, given in zip(menu.sites, known, strict=True) if given))
    weights = np.zeros(len(wanted))
    weights[known] = departures(part, indices[known])
    return weights


def _relative(options: SiteMenu) -> NDArray[np.float64]:
    [site] = options.sites
    choices = [choice for index in range(len(options.choices)) for _, choice in options.assigned(index)]
    return np.array(
        [
            1.0 if choice.is_dense else choice.chi / max(resolve(choice.topology, *site.shape()).full_bonds)
            for choice in choices
        ]
    )


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
