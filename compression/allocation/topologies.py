"""Lists the topologies that are worth fitting to a site.

Knows shapes and names; does not know weights. benchmarks/fit_quality.py measures how good these topologies are.
"""

from __future__ import annotations

from compression.numerics.legs import Legs, balanced, leg_name
from compression.sites import Site

__all__ = ["fitted_topologies", "head_legs"]


def fitted_topologies(site: Site, head_size: int | None = None, cores: tuple[int, ...] = (2,)) -> tuple[str, ...]:
    """Returns names of the MPOs to fit in addition to `lowrank`: balanced legs and, in attention, legs along the heads.

    A dimension without two proper factors gives fewer names or none, because an MPO with legs of 1 is `lowrank` again.

    Args:
        site: the site.
        head_size: features of one attention head; None if the model has no heads.
        cores: numbers of cores to try.
    """
    names = []
    for count in cores:
        legs = Legs(balanced(site.out_features, count), balanced(site.in_features, count), pivoted=True)
        if min(legs.out_legs) > 1 and min(legs.in_legs) > 1:
            names.append(leg_name(legs))
    followed = head_legs(site, head_size) if 2 in cores and head_size else None
    if followed is not None:
        names.append(leg_name(followed))
    return tuple(dict.fromkeys(names))


def head_legs(site: Site, head_size: int) -> Legs | None:
    """Returns legs heads × head size for an attention matrix; a side that is not made of several heads is balanced.

    Returns None for a matrix outside attention, or if a leg would be 1.
    """
    if "attn" not in site.name and "attention" not in site.name:
        return None
    sides = []
    for dimension in (site.out_features, site.in_features):
        heads, rest = divmod(dimension, head_size)
        sides.append((heads, head_size) if rest == 0 and heads > 1 else balanced(dimension, 2))
    if min(sides[0] + sides[1]) < 2:
        return None
    return Legs(sides[0], sides[1], pivoted=True)
