"""Analyses sensitivity tables: the KL that each single site costs at a given χ while everything else stays dense.

Knows rows and numbers; does not know how they are measured (`search.profiling.sweep`) or drawn
(`search.reporting.heat_maps`).
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
"""A site tolerates a χ if its KL there is at most this, in nats per token."""
CACHED = ("k", "v")
"""Families whose outputs are stored in the KV cache."""
_LEAST = 1e-7  # below this, measured KL is noise; logarithms are taken of at least this
_PERMUTATIONS = 10_000
_NAMED = 5  # number of blocks that a summary lists at each end


@dataclass(frozen=True)
class Row:
    """Measurement of one site at one χ with all other sites dense.

    Attributes:
        relative_chi: χ divided by the full χ, in (0, 1].
        kept_fraction: parameters of this site after / before compression.
        predicted_kl: KL that the menu predicts, in nats per token.
        kl, kl_standard_error: measured KL and its standard error, in nats per token; NaN unless the state is "ok".
        expected_accuracy: mean probability of the correct answer, P(correct).
        state: state of the score, "ok" or the kind of failure.
        seconds: duration of the measurement.
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
    """Return the content of sensitivity.csv: rows sorted by block, site and χ, numbers at full precision."""
    return csv_text([asdict(row) for row in sorted(rows, key=lambda row: (row.block, row.site, row.chi))])


def parse_rows(text: str) -> list[Row]:
    """Read what `rows_text` wrote.

    Raises:
        ValueError: the columns differ from those of `Row`, or a cell is not a number where one is expected.
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
    """Return Spearman's ρ, the correlation of ranks with ties at their mean rank; NaN if either input is constant."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (first, second)]
    centred = [one - one.mean() for one in ranks]
    scale = math.sqrt(float((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum() / scale) if scale else math.nan


def block_by_family(rows: Sequence[Row]) -> tuple[list[int], list[str], NDArray[np.float64]]:
    """Return blocks, families, and the geometric mean of KL over χ and sites, shape (blocks, families).

    A cell is NaN if nothing was measured there.
    """
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
    """Return blocks, the χ that were measured at every site, and the sum of KL over a block's sites, (blocks, χ)."""
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
    """Return measured sensitivity traces by site, for a prior; measurements that failed are left out."""
    by_site: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.chi):
        if row.state == "ok":
            by_site[row.site].append(row)
    return {
        site: Sensitivity(source="measured", chi=tuple(row.chi for row in of), kl=tuple(row.kl for row in of))
        for site, of in by_site.items()
    }


def summary(rows: Sequence[Row], model: str, context: int | None = None) -> str:
    """Summarize a table on one page: rank correlation with the menu, fragile and tolerant blocks, effect of depth.

    Args:
        model: name of the model.
        context: length in tokens of the text that was measured, if the sweep covered the sites that fill the KV cache
            only; None otherwise.
    """
    used = [row for row in rows if row.state == "ok"]
    if not used:
        return f"{model}: nothing measured\n"
    lines = [
        f"Sensitivity of {model}: {len(rows)} measurements, {len({row.site for row in rows})} sites, one at a time.",
        "",
        "Rank correlation (Spearman) between the KL that the menu predicts and the measured KL:",
        f"  all      {_correlation(used):6.3f}  ({len(used)} points; measured / predicted, median {_ratio(used):.2f})",
    ]
    for family in dict.fromkeys(row.family for row in used):
        of = [row for row in used if row.family == family]
        lines.append(f"  {family:<8} {_correlation(of):6.3f}  ({len(of)} points; {_ratio(of):.2f})")
    if context:
        lines += ["", *_cache(used, context)]
    blocks, chis, table = block_by_chi(used)
    if not chis or len(blocks) < 2:
        return "\n".join([*lines, "", "No χ was measured at every site, so blocks are not compared."]) + "\n"
    fragility = np.exp(np.log(np.maximum(table, _LEAST)).mean(axis=1))
    order = np.argsort(-fragility, kind="stable")
    lines += [
        "",
        f"Blocks by the summed KL of their sites, geometric mean over χ = {', '.join(map(str, chis))}:",
        "  most fragile:  " + _list(blocks, fragility, order[:_NAMED]),
        "  least fragile: " + _list(blocks, fragility, order[::-1][:_NAMED]),
        "",
        *_tolerance(used, blocks, chis[0], table[:, 0]),
        "",
        *_depth(fragility),
    ]
    return "\n".join(lines) + "\n"


def _cache(rows: Sequence[Row], context: int) -> list[str]:
    """Report, by family, the share of the KV cache that remains when it stores latents, and the KL that this costs."""
    lines = [
        f"KV cache, measured on a text of {context} tokens. For a low-rank site the cache stores χ numbers per",
        "position instead of all outputs (generate --latent-cache). KL is that of single sites in nats per token,",
        "summed over blocks.",
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
    """Report whether fragility changes with depth, by rank correlation and a permutation test."""
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
        verdict = "Here early blocks are more fragile" if rho < 0 else "Here late blocks are more fragile"
    return [
        "CompactifAI and its reproduction report that early blocks are more fragile.",
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
    """Return ranks from 0, with ties at their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[place]
