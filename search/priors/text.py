"""Prints priors as plain text: a bar per block, totals, and the differences between two priors. Uses no colours."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from search.priors.format import Estimate, Prior, PriorScore, PriorSite
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
    families = _families(prior.sites)
    lines = [
        f"{plain(prior.model.id)}  {plain(prior.model.digest[:12])}  kept {prior.kept_fraction:.4f} of the sites"
        + _told(", {:.4f} of the model", prior.model_kept_fraction)
        + _told(", {:.4f} of its bytes", prior.bytes_fraction),
        f"schedule {plain((prior.schedule_digest or 'by hand')[:12])}  made {_environment(prior, 'date')[:10]} at "
        f"commit {_environment(prior, 'commit')[:12]} by: {_environment(prior, 'command')}",
        "",
        f"{'block':>5}  {'kept':<{_BAR}}  {'':>5}  " + " ".join(f"{plain(family)[-6:]:>6}" for family in families),
    ]
    for block, of in groupby(sorted(prior.sites, key=lambda site: site.block), key=lambda site: site.block):
        sites = list(of)
        kept = _kept(sites)
        lines.append(f"{block:>5}  {bar(kept)}  {kept:5.3f}  " + " ".join(_cell(sites, family) for family in families))
    by_family = [_kept([site for site in prior.sites if site.family == family]) for family in families]
    totals = f"{'all':>5}  {bar(prior.kept_fraction)}  {prior.kept_fraction:5.3f}  "
    lines.append(totals + " ".join(f"{kept:6.3f}" for kept in by_family))
    dense = sum(site.chi is None for site in prior.sites)
    sources = sorted({site.sensitivity.source for site in prior.sites if site.sensitivity})
    lines += [
        "",
        f"cells: χ, or d for dense ({dense} of {len(prior.sites)} sites); last row: kept fractions; "
        f"sensitivity traces: {plain(', '.join(sources)) or 'none'}",
    ]
    return "\n".join(lines) + "\n" + (f"\n{_scores(prior.scores)}" if prior.scores else "")


def diff_text(first: Prior, second: Prior) -> str:
    """Return the differences between two priors: models, totals, kept fraction by block, and χ by site."""
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
        far = sorted(changed, key=lambda pair: -abs(pair[1].relative_chi - pair[0].relative_chi))
        lines += ["", f"the {min(_MOST, len(far))} sites whose relative χ changed most:"]
        lines += [f"  {plain(old.name)}: {_choice(old)} → {_choice(new)}" for old, new in far[:_MOST]]
    return "\n".join(lines) + "\n" if lines else "the same model and the same schedule\n"


def _families(sites: Sequence[PriorSite]) -> list[str]:
    return list(dict.fromkeys(site.family for site in sites))


def _kept(sites: Sequence[PriorSite]) -> float:
    return sum(site.parameters for site in sites) / max(1, sum(site.dense_parameters for site in sites))


def _cell(sites: Sequence[PriorSite], family: str) -> str:
    """Return the χ of a family in a block; the mean if the block has several sites of the family."""
    of = [site for site in sites if site.family == family]
    if not of:
        return f"{'-':>6}"
    if all(site.chi is None for site in of):
        return f"{'d':>6}"
    chis = [site.chi for site in of if site.chi is not None]
    return f"{sum(chis) / len(chis):6.0f}"


def _choice(site: PriorSite) -> str:
    return "dense" if site.chi is None else f"{site.topology} χ {site.chi}"


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
