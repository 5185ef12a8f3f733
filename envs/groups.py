"""Groups sites into the steps of an episode. Knows the names, blocks and families of sites; nothing else of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compression.allocation.menu import Menu
from compression.refusal import Refusal
from compression.sites import Site, Unit

__all__ = ["GRANULARITIES", "Group", "group_sites"]

GRANULARITIES = ("block", "family", "block+family", "site", "head")


@dataclass(frozen=True)
class Group:
    """Names the sites that one step decides about. A site whose menu offers only dense belongs to no group.

    Attributes:
        name: for example "block_07" or "family_down".
        sites: indices into the menu.
    """

    name: str
    sites: tuple[int, ...]


def group_sites(menu: Menu, granularity: str) -> tuple[Group, ...]:
    """Returns the groups of a menu: per block, per family, per block and then per family, per site, or per head.

    Heads exist if `compression.layers.heads.split_heads_` has split the attention matrices. The group of a head, such
    as "block_07_head_02", contains its part of every attention matrix. Query heads that share keys and values form one
    group together with them. The remaining sites of a block form one group, such as "block_07_other".

    Raises:
        ValueError: the granularity is unknown, or it is "head" and the menu has no heads.
    """
    if granularity not in GRANULARITIES:
        raise Refusal(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    sites = [menu_of.site for menu_of in menu.sites]
    free = [index for index, menu_of in enumerate(menu.sites) if len(menu_of.choices) > 1]
    if granularity == "site":
        return tuple(Group(sites[index].name, (index,)) for index in free)
    heads = _heads(sites) if granularity == "head" else {}
    if granularity == "head" and not heads:
        raise Refusal("granularity head needs attention matrices split into heads (per_head), and there are none")
    groups: list[Group] = []
    for kind in granularity.split("+"):
        keys: dict[str, list[int]] = {}
        for index in free:
            block = f"block_{sites[index].block:02d}"
            if kind == "head":
                key = f"{block}_head_{heads[index]:02d}" if index in heads else f"{block}_other"
            else:
                key = block if kind == "block" else f"family_{sites[index].family}"
            keys.setdefault(key, []).append(index)
        groups += [Group(name, tuple(indices)) for name, indices in keys.items()]
    return tuple(groups)


def _heads(sites: Sequence[Site | Unit]) -> dict[int, int]:
    """Returns the number of the head within its attention module, by index of every site that is part of a head.

    A part is named by its matrix followed by its number. The last matrix of an attention module reads the heads (o) and
    has one part per head; the other matrices produce them (q, k, v). If a single matrix produces them and has more
    parts, these are the queries, then the keys, then the values. If there are fewer keys and values than queries,
    neighbouring queries share them.
    """
    modules: dict[str, dict[str, list[int]]] = {}
    for index, site in enumerate(sites):
        matrix, _, part = site.name.rpartition(".")
        if part.isdecimal() and ("attn" in matrix or "attention" in matrix):
            modules.setdefault(matrix.rpartition(".")[0], {}).setdefault(matrix, []).append(index)
    found: dict[int, int] = {}
    for matrices in modules.values():
        *makers, readers = matrices.values()
        runs = [*makers, readers]
        if len(makers) == 1 and len(makers[0]) > len(readers):
            fused, queries = makers[0], len(readers)
            half = (len(fused) - queries) // 2
            runs = [fused[:queries], fused[queries : queries + half], fused[queries + half :], readers]
        shared = min(len(run) for run in runs if run)
        for run in runs:
            found |= {index: part * shared // len(run) for part, index in enumerate(run)}
    return found
