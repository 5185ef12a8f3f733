"""Topologies worth fitting to a site: which legs to try.

Names only; knows no weight. What they are worth is measured in benchmarks/fit_quality.py.
"""

from __future__ import annotations

from compression.numerics.legs import Legs, balanced, leg_name
from compression.sites import Site

__all__ = ["fitted_topologies", "head_legs"]


def fitted_topologies(site: Site, head_size: int | None = None, cores: tuple[int, ...] = (2,)) -> tuple[str, ...]:
    """Names of the MPOs to fit beside `lowrank`: balanced legs, and for an attention matrix legs that follow its heads.

    Args:
        head_size: features of one attention head; None if the model has none.
        cores: numbers of cores.

    A site whose dimensions have no two proper factors gives fewer, or none: an MPO with legs of 1 is `lowrank` again.
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
    """Legs heads × head size on every side of an attention matrix that consists of whole heads, else balanced ones.

    None for a matrix outside attention, or one of whose sides is a single head.
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
