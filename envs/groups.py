"""Groups: which sites one step of an episode decides about. Reads the names, blocks and families of sites only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compression.allocation.menu import Menu
from compression.refusal import Refusal
from compression.sites import Site

__all__ = ["GRANULARITIES", "Group", "group_sites"]

GRANULARITIES = ("block", "family", "block+family", "site", "head")


@dataclass(frozen=True)
class Group:
    """The sites one step decides about: indices into the menu, and a name such as "block_07" or "family_down".

    A site whose menu has no option but dense is in no group.
    """

    name: str
    sites: tuple[int, ...]


def group_sites(menu: Menu, granularity: str) -> tuple[Group, ...]:
    """The groups of a menu: one per block, per family, per block and then per family, per site, or per attention head.

    Heads are found where `compression.layers.heads.split_heads_` cut the attention matrices. The group of a head, such
    as "block_07_head_02", holds its part of every matrix. Where several heads read the same keys and values,
    these and all that read them are one group. What belongs to no head is one group of its block, such as
    "block_07_other".

    Raises:
        ValueError: no such granularity, or no heads where they are asked for.
    """
    if granularity not in GRANULARITIES:
        raise Refusal(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    sites = [menu_of.site for menu_of in menu.sites]
    free = [index for index, menu_of in enumerate(menu.sites) if len(menu_of.choices) > 1]
    if granularity == "site":
        return tuple(Group(sites[index].name, (index,)) for index in free)
    heads = _heads(sites) if granularity == "head" else {}
    if granularity == "head" and not heads:
        raise Refusal("granularity head needs attention matrices cut into heads (per_head), and there are none")
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


def _heads(sites: Sequence[Site]) -> dict[int, int]:
    """The head within its attention module of every site that is part of one, by index.

    Parts are named by their number behind the matrix they were cut from. The last matrix of a module reads the heads
    and has as many parts as there are; the others make them. A single maker of more parts holds queries, then keys,
    then values. Fewer keys and values than queries are shared by queries next to each other.
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
