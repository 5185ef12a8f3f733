"""Sensitivity: what single sites cost at a χ, everything else dense, and what a table of that says. NumPy values only.

Knows rows and figures; not how they are measured (`search.profiling.sweep`) or drawn (`search.reporting.heat_maps`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import get_type_hints

import numpy as np
from numpy.typing import NDArray

from compression.refusal import Refusal
from search.priors.format import Sensitivity
from search.reporting.frames import csv_text, parse_records

__all__ = [
    "CACHED",
    "TOLERABLE",
    "Row",
    "block_by_chi",
    "block_by_family",
    "parse_rows",
    "rank_correlation",
    "rows_text",
    "summary",
    "traces",
]

TOLERABLE = 0.01
"""Nats per token below which a site counts as one that tolerates a χ."""
CACHED = ("k", "v")
"""Families whose outputs fill the KV cache."""
_LEAST = 1e-7  # measured KL is noise below; logarithms start here
_PERMUTATIONS = 10_000
_NAMED = 5  # blocks that a summary lists at either end


@dataclass(frozen=True)
class Row:
    """One site at one χ, all others dense.

    Attributes:
        relative_chi: χ over full χ.
        kept_fraction: parameters after / before of this site.
        predicted_kl: the menu's cost, nats per token.
        kl, kl_standard_error: measured, nats per token; NaN where the state is not "ok".
        expected_accuracy: P(correct).
        state: of the score.
    """

    site: str
    block: int
    family: str
    topology: str
    chi: int
    relative_chi: float
    kept_fraction: float
    predicted_kl: float
    kl: float
    kl_standard_error: float
    expected_accuracy: float
    perplexity: float
    state: str
    seconds: float


def rows_text(rows: Iterable[Row]) -> str:
    """The content of sensitivity.csv, by block, site and χ; figures as exact as they are."""
    return csv_text([asdict(row) for row in sorted(rows, key=lambda row: (row.block, row.site, row.chi))])


def parse_rows(text: str) -> list[Row]:
    """Inverse of `rows_text`.

    Raises:
        ValueError: other columns, or a figure that is none.
    """
    kinds = get_type_hints(Row)
    records = parse_records(text)
    if records and list(records[0]) != [field.name for field in fields(Row)]:
        raise Refusal(f"the columns must be {', '.join(kinds)}, got {', '.join(records[0])}")
    rows = []
    for number, record in enumerate(records, 2):
        try:
            values = {
                name: kinds[name](math.nan if kinds[name] is float and not text else text)
                for name, text in record.items()
            }
            rows.append(Row(**values))
        except (TypeError, ValueError) as error:
            raise Refusal(f"line {number}: {error}") from None
    return rows


def rank_correlation(
    first: Sequence[float] | NDArray[np.float64], second: Sequence[float] | NDArray[np.float64]
) -> float:
    """Spearman's ρ: the correlation of ranks, equal values sharing their mean rank; NaN where either is constant."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (first, second)]
    centred = [one - one.mean() for one in ranks]
    scale = math.sqrt(float((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum() / scale) if scale else math.nan


def block_by_family(rows: Sequence[Row]) -> tuple[list[int], list[str], NDArray[np.float64]]:
    """Geometric mean of KL over χ and sites, (blocks, families); NaN where nothing was measured."""
    blocks, families = sorted({row.block for row in rows}), list(dict.fromkeys(row.family for row in rows))
    logs: Mapping[tuple[int, str], list[float]] = defaultdict(list)
    for row in rows:
        if row.state == "ok":
            logs[row.block, row.family].append(math.log(max(row.kl, _LEAST)))
    table = np.full((len(blocks), len(families)), np.nan)
    for (block, family), of in logs.items():
        table[blocks.index(block), families.index(family)] = math.exp(sum(of) / len(of))
    return blocks, families, table


def block_by_chi(rows: Sequence[Row]) -> tuple[list[int], list[int], NDArray[np.float64]]:
    """Sum over the sites of a block of KL, (blocks, χ), at each χ that was measured at every site."""
    counts: dict[int, set[str]] = defaultdict(set)
    for row in rows:
        counts[row.chi].add(row.site)
    common = {chi for chi, sites in counts.items() if sites == {row.site for row in rows}}
    blocks = sorted({row.block for row in rows})
    table = np.zeros((len(blocks), len(common)))
    chis = sorted(common)
    for row in rows:
        if row.chi in common:
            table[blocks.index(row.block), chis.index(row.chi)] += row.kl
    return blocks, chis, table


def traces(rows: Iterable[Row]) -> dict[str, Sensitivity]:
    """Measured traces by site, for a prior; points without a score are left out."""
    by_site: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.chi):
        if row.state == "ok":
            by_site[row.site].append(row)
    return {
        site: Sensitivity(source="measured", chi=tuple(row.chi for row in of), kl=tuple(row.kl for row in of))
        for site, of in by_site.items()
    }


def summary(rows: Sequence[Row], model: str, context: int | None = None) -> str:
    """What the table says, in a page: the menu's ranks, fragile and tolerant blocks, and whether depth matters.

    Args:
        context: length of the text they were measured on, if they are of k and v for the sake of the cache.
    """
    used = [row for row in rows if row.state == "ok"]
    if not used:
        return f"{model}: nothing measured\n"
    lines = [
        f"Sensitivity of {model}: {len(rows)} measurements, {len({row.site for row in rows})} sites, one at a time.",
        "",
        "Rank correlation (Spearman) of the menu's predicted KL with the measured KL:",
        f"  all      {_correlation(used):6.3f}  ({len(used)} points; measured / predicted, median {_ratio(used):.2f})",
    ]
    for family in dict.fromkeys(row.family for row in used):
        of = [row for row in used if row.family == family]
        lines.append(f"  {family:<8} {_correlation(of):6.3f}  ({len(of)} points; {_ratio(of):.2f})")
    if context:
        lines += ["", *_cache(used, context)]
    blocks, chis, table = block_by_chi(used)
    if not chis or len(blocks) < 2:
        return "\n".join([*lines, "", "No χ was measured at every site: blocks are not compared."]) + "\n"
    fragility = np.exp(np.log(np.maximum(table, _LEAST)).mean(axis=1))
    order = np.argsort(-fragility, kind="stable")
    lines += [
        "",
        f"Blocks by the KL of their sites together, geometric mean over χ = {', '.join(map(str, chis))}:",
        "  most fragile:  " + _list(blocks, fragility, order[:_NAMED]),
        "  least fragile: " + _list(blocks, fragility, order[::-1][:_NAMED]),
        "",
        *_tolerance(used, blocks, chis[0], table[:, 0]),
        "",
        *_depth(fragility),
    ]
    return "\n".join(lines) + "\n"


def _cache(rows: Sequence[Row], context: int) -> list[str]:
    """What the cache keeps where latents stand in it, family by family, and what that costs."""
    lines = [
        f"Of the KV cache, on a text of {context} tokens; a low-rank site keeps χ numbers a position instead of all",
        "its outputs (generate --latent-cache). KL, nats a token: what sites cost one by one, summed over blocks.",
    ]
    for family in CACHED:
        of = [row for row in rows if row.family == family]
        blocks, chis, table = block_by_chi(of)
        for chi, kl in zip(chis, table.sum(0), strict=True):
            share = next(row.relative_chi for row in of if row.chi == chi)
            worst = blocks[int(table[:, chis.index(chi)].argmax())]
            lines.append(f"  {family}, χ {chi:<4} keeps {share:4.0%}, KL {kl:.4f}, most of it in block {worst}")
    return lines


def _tolerance(rows: Sequence[Row], blocks: Sequence[int], chi: int, kl: NDArray[np.float64]) -> list[str]:
    smallest = [row for row in rows if row.chi == chi]
    good = [row for row in smallest if row.kl <= TOLERABLE]
    families: dict[str, list[bool]] = defaultdict(list)
    for row in smallest:
        families[row.family].append(row.kl <= TOLERABLE)
    return [
        f"The smallest χ, {chi}, costs at most {TOLERABLE} nats per token at {len(good)} of {len(smallest)} sites: "
        + ", ".join(f"{family} {sum(flags)} of {len(flags)}" for family, flags in families.items())
        + ".",
        f"  blocks that tolerate it best:  {_list(blocks, kl, np.argsort(kl, kind='stable')[:_NAMED])}",
    ]


def _depth(fragility: NDArray[np.float64]) -> list[str]:
    """Whether early blocks are the fragile ones, by rank correlation with depth and a permutation test."""
    count = len(fragility)
    depth = np.arange(count, dtype=np.float64)
    rho = rank_correlation(depth, fragility)
    generator = np.random.default_rng(0)
    chance = [abs(rank_correlation(depth, generator.permutation(fragility))) for _ in range(_PERMUTATIONS)]
    p = (1 + sum(value >= abs(rho) - 1e-12 for value in chance)) / (1 + _PERMUTATIONS)
    third = max(1, count // 3)
    parts = [fragility[:third], fragility[third:-third], fragility[-third:]]
    means = [float(np.exp(np.log(np.maximum(part, _LEAST)).mean())) if len(part) else math.nan for part in parts]
    if p >= 0.05:
        verdict = "Here fragility has no clear trend with depth"
    else:
        verdict = "Here early blocks are the fragile ones" if rho < 0 else "Here late blocks are the fragile ones"
    return [
        "CompactifAI and its reproduction report that early blocks are the fragile ones.",
        f"{verdict}: rank correlation of fragility with depth {rho:+.2f} (permutation test, p = {p:.4f}); geometric "
        f"means of the first, middle and last third of the blocks {means[0]:.4f}, {means[1]:.4f} and {means[2]:.4f}. "
        f"The first block costs {fragility[0] / np.median(fragility):.1f} times the median block, the last one "
        f"{fragility[-1] / np.median(fragility):.1f} times.",
    ]


def _list(blocks: Sequence[int], values: NDArray[np.float64], order: NDArray[np.int64]) -> str:
    return ", ".join(f"{blocks[place]} ({values[place]:.4f})" for place in order)


def _correlation(rows: Sequence[Row]) -> float:
    return rank_correlation([row.predicted_kl for row in rows], [row.kl for row in rows])


def _ratio(rows: Sequence[Row]) -> float:
    return float(np.median([max(row.kl, _LEAST) / max(row.predicted_kl, _LEAST) for row in rows]))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0, ties at their mean."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[place]
