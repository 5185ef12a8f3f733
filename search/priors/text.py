"""Prints priors as plain text: a bar per block, totals, and the differences between two priors. Uses no colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from compression.numerics.packed_size import FLOATING
from search.priors.format import Estimate, Prior, PriorBond, PriorScore, PriorSite
from search.reporting.tables import Column, text_table
from search.runtime.outside_text import plain

__all__ = ["bar", "diff_text", "show_text"]

_BAR = 24  # width of a full bar in characters
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_MOST = 20  # number of sites that `diff_text` lists


def bar(fraction: float, width: int = _BAR) -> str:
    """Return a bar of `width` characters, filled to a fraction in [0, 1] at a resolution of 1/8 character."""
    eighths = round(min(1.0, max(0.0, fraction)) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def show_text(prior: Prior) -> str:
    """Return a prior on one page: model, kept fractions, one line per block, and scores."""
    ordered = sorted(prior.sites, key=lambda site: site.block)
    blocks = {block: list(of) for block, of in groupby(ordered, key=lambda site: site.block)}
    families = _families(prior.sites)
    kept = [_kept(sites) for sites in blocks.values()]
    columns = [
        [f"{'block':>5}", *(f"{block:>5}" for block in blocks), f"{'all':>5}"],
        [f" {'kept':<{_BAR}} ", *(f" {bar(one)} " for one in [*kept, prior.kept_fraction])],
        ["", *(f"{one:5.3f} " for one in [*kept, prior.kept_fraction])],
        *_widths(blocks),
    ]
    for family in families:
        cells = (_cell(sites, family) for sites in blocks.values())
        own = _kept([site for site in prior.sites if site.family == family])
        columns.append([f"{plain(family)[-6:]:>6}", *cells, f"{own:6.3f}"])
    wide = [max(map(len, column)) for column in columns]
    table = [
        " ".join(cell.rjust(size) for cell, size in zip(line, wide, strict=True)) for line in zip(*columns, strict=True)
    ]
    dense = sum(site.choice.is_dense for site in prior.sites)
    pruned = sum(site.entries is not None for site in prior.sites)
    smaller = sum(site.chi is None for site in prior.sites) - dense - pruned
    traces = [site.sensitivity for site in prior.sites]
    of_bonds = [bond.sensitivity for site in prior.sites for bond in site.bonds or ()]
    sources = sorted({trace.source for trace in (*traces, *of_bonds) if trace is not None})
    lines = [
        f"{plain(prior.model.id)}  {plain(prior.model.digest[:12])}  kept {prior.kept_fraction:.4f} of the sites"
        + _told(", {:.4f} of the model", prior.model_kept_fraction)
        + _told(", {:.4f} of its bytes", prior.bytes_fraction),
        f"schedule {plain((prior.schedule_digest or 'by hand')[:12])}  made {_environment(prior, 'date')[:10]} at "
        f"commit {_environment(prior, 'commit')[:12]} by: {_environment(prior, 'command')}",
        "",
        *table,
        "",
        f"cells: χ, or d for dense ({dense} of {len(prior.sites)} sites)"
        + (f", or s for smaller without factors ({smaller} sites)" if smaller else "")
        + (f", or p and the share of the entries that are stored of a pruned matrix ({pruned} sites)" if pruned else "")
        + ("; of a bond, the groups that are kept of all" if prior.has_widths else "")
        + f"; last row: kept fractions; sensitivity traces: {plain(', '.join(sources)) or 'none'}",
    ]
    return "\n".join(lines) + "\n" + (f"\n{_scores(prior.scores)}" if prior.scores else "")


def diff_text(first: Prior, second: Prior) -> str:
    """Return the differences between two priors: models, totals, kept fraction by block, and χ and width by site."""
    lines = []
    for name in ("id", "digest", "config_digest"):
        before, after = getattr(first.model, name), getattr(second.model, name)
        if before != after:
            lines.append(f"model.{name}: {_short(before)} → {_short(after)}")
    for name in ("target_kept", "kept_fraction", "model_kept_fraction", "bytes_fraction"):
        before, after = getattr(first, name), getattr(second, name)
        if before != after:
            lines.append(f"{name}: {_figure(before)} → {_figure(after)}")
    before_sites, after_sites = ({site.name: site for site in prior.sites} for prior in (first, second))
    for where, names in (
        ("first", before_sites.keys() - after_sites.keys()),
        ("second", after_sites.keys() - before_sites.keys()),
    ):
        if names:
            lines.append(f"only in the {where}: {len(names)} sites, such as {plain(min(names))}")
    changed = [
        (site, after_sites[name])
        for name, site in before_sites.items()
        if name in after_sites and site.choice != after_sites[name].choice
    ]
    if changed:
        lines += ["", f"{len(changed)} sites differ in their choice; kept fraction by block:"]
        for block, of in groupby(sorted(changed, key=lambda pair: pair[0].block), key=lambda pair: pair[0].block):
            before, after = (_kept([site for site in prior.sites if site.block == block]) for prior in (first, second))
            lines.append(
                f"{block:>5}  {bar(before, 16)} {before:5.3f} → {bar(after, 16)} {after:5.3f}  {after - before:+.3f}"
                f"  {len(list(of))} sites"
            )
        far = sorted(changed, key=lambda pair: -_distance(*pair))
        what = "χ or width" if first.has_widths or second.has_widths else "χ"
        lines += ["", f"the {min(_MOST, len(far))} sites whose relative {what} changed most:"]
        lines += [f"  {plain(old.name)}: {_choice(old)} → {_choice(new)}" for old, new in far[:_MOST]]
    return "\n".join(lines) + "\n" if lines else "the same model and the same schedule\n"


def _distance(old: PriorSite, new: PriorSite) -> float:
    return max(
        abs(new.relative_chi - old.relative_chi),
        abs(new.relative_width - old.relative_width),
        abs(new.relative_density - old.relative_density),
        abs(new.relative_bits - old.relative_bits),
    )


def _families(sites: Sequence[PriorSite]) -> list[str]:
    return list(dict.fromkeys(site.family for site in sites))


def _kept(sites: Sequence[PriorSite]) -> float:
    return sum(site.parameters for site in sites) / max(1, sum(site.dense_parameters for site in sites))


def _widths(blocks: Mapping[int, Sequence[PriorSite]]) -> list[list[str]]:
    """Return one column per kind of bond: a heading, the kept groups of all in every block, and the kept fraction."""
    found: dict[str, dict[int, list[PriorBond]]] = {}
    for block, sites in blocks.items():
        for bond in (bond for site in sites for bond in site.bonds or () if bond.side == "in"):
            found.setdefault(bond.name.rsplit(".", 1)[-1], {}).setdefault(block, []).append(bond)
    columns = []
    for kind, of in found.items():
        pairs = {
            block: [sum(one.width for one in bonds), sum(one.groups for one in bonds)] for block, bonds in of.items()
        }
        cells = [f"{pairs[block][0]}/{pairs[block][1]}" if block in pairs else "full" for block in blocks]
        parts = [pairs[block][0] / pairs[block][1] if block in pairs else 1.0 for block in blocks]
        columns.append([plain(kind), *cells, f"{sum(parts) / len(parts):.3f}"])
    return columns


def _cell(sites: Sequence[PriorSite], family: str) -> str:
    """Return the χ or density of a family in a block; the mean if the block has several sites of the family."""
    of = [site for site in sites if site.family == family]
    if not of:
        return "-"
    chis = [site.chi for site in of if site.chi is not None]
    if not chis and any(site.choice.keeps_entries for site in of):
        return _entries_cell(of)
    if not chis:
        return "d" if all(site.choice.is_dense for site in of) else "s"
    return f"{sum(chis) / len(chis):.0f}"


def _entries_cell(of: Sequence[PriorSite]) -> str:
    """Return the mean density if some are pruned, as p0.50, and the mean bits if some are rounded, as 4b."""
    density = sum(site.relative_density for site in of) / len(of)
    bits = sum(site.bits or FLOATING for site in of) / len(of)
    pruned = f"p{density:.2f}" if any(site.entries is not None for site in of) else ""
    return pruned + (f"{bits:.3g}b" if any(site.bits for site in of) else "")


def _choice(site: PriorSite) -> str:
    form = "dense" if site.choice.is_dense else "smaller" if site.chi is None else f"{site.topology} χ {site.chi}"
    if site.entries is not None:
        form = f"pruned to {site.relative_density:.3f}"
    if site.bits is not None:
        form = f"{form} in {site.bits} bits" if site.entries is not None else f"in {site.bits} bits"
    return form + "".join(f" at width {bond.width} of {bond.groups}" for bond in site.bonds or ())


def _environment(prior: Prior, name: str) -> str:
    return plain(prior.environment.get(name) or "unknown")


def _told(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def _short(value: object) -> str:
    return plain(str(value or "unknown")[:40])


_COLUMNS = (
    Column("schedule", "schedule"),
    Column("kept_fraction", "kept", ".3f"),
    Column("kl", "KL nats/token (95 %)"),
    Column("perplexity", "perplexity", ".2f"),
    Column("expected_accuracy", "P(correct) (95 %)"),
    Column("items", "items", ",d"),
    Column("tokens", "tokens", ",d"),
    Column("parameters", "parameters", ",d"),
    Column("bytes", "bytes", ",d"),
)


def _scores(scores: Sequence[PriorScore]) -> str:
    rows = [
        score.model_dump() | {"kl": _estimate(score.kl), "expected_accuracy": _estimate(score.expected_accuracy)}
        for score in scores
    ]
    return text_table(rows, _COLUMNS)


def _estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    bounds = "" if estimate.low is None else f" ({estimate.low:.4f} to {estimate.high:.4f})"
    return f"{estimate.value:.4f}{bounds}"
