"""Builds priors: combines the schedule of a run with everything else that `search.priors.format` requires.

Knows loaded models, menus and data; does not know how a prior is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from compression.allocation.menu import Menu, SiteMenu
from compression.allocation.prices import departures
from compression.numerics.legs import resolve
from compression.schedule import Choice, Joint, Schedule
from compression.sites import Cut, Site, model_bytes, model_parameters
from compression.size import Price, choice_parameters
from search.config import Config
from search.data.splits import Splits
from search.model.budget import Budget
from search.model.loading import LoadedModel
from search.priors.format import Prior, Sensitivity, WidthSensitivity
from search.priors.versions import FORMAT, VERSION, score_entry
from search.runtime.files import finite
from search.runtime.provenance import environment

__all__ = ["build_prior", "config_digest", "predicted_trace", "predicted_widths"]

_LEVELS = tuple(level / 10 for level in range(1, 10))  # the χ or widths of a predicted trace, relative to the full one
_DIGITS = 6  # significant digits of predicted numbers
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")


def build_prior(
    config: Config,
    loaded: LoadedModel,
    menu: Menu,
    schedule: Schedule,
    rows: Sequence[Mapping[str, object]],
    splits: Splits,
    traces: Mapping[str, Sensitivity] | None = None,
    before: Mapping[str, object] = MappingProxyType({}),
) -> Prior:
    """Return the prior of a schedule.

    Args:
        loaded: the model, which must be dense.
        menu: the model's menu; yields predicted traces and the closed form that offsets are measured from. The sites of
            a unit all get the offset of the unit.
        rows: final table of the run, see `search.reporting.tables.SUMMARY_COLUMNS`.
        traces: measured traces by site, which replace the predicted ones.
        before: as for `search.runtime.provenance.environment`.
    """
    sites = [site for options in menu.sites for site in options.sites]
    budget = Budget.of(config, loaded.model, sites)
    size = budget.sizes.size(schedule)
    offsets = departures(menu, _indices(menu, schedule, budget.price))
    document = {
        "format": FORMAT,
        "version": VERSION,
        "model": {
            "id": loaded.model_id,
            "digest": loaded.digest,
            "config_digest": config_digest(loaded),
            "license": loaded.license,
            "parameters": model_parameters(loaded.model),
            "bytes": model_bytes(loaded.model),
        },
        "target_kept": budget.target_kept,
        "kept_fraction": size.kept_fraction,
        "model_kept_fraction": size.model_kept_fraction,
        "bytes_fraction": size.bytes_fraction,
        "schedule_digest": schedule.digest,
        "seeds": {"run": config.seed},
        "sites": [
            _site(site, schedule[site.name], predicted_widths(options)) | _learned(options, site, float(offset), traces)
            for options, offset in zip(menu.sites, offsets, strict=True)
            for site in options.sites
        ],
        "scores": [score_entry(row) for row in rows],
        "data": {
            "calibration": splits.calibration.digest,
            "search_text": splits.search_text.digest,
            "heldout_text": splits.heldout_text.digest,
            "search_items": sorted(item.digest for item in splits.search_items),
            "report_items": sorted(item.digest for item in splits.report_items),
        },
        "configuration": {**config.definition(), "budget": config.budget, "dtype": config.dtype},
        "environment": environment(before),
    }
    fields = finite(document)
    assert isinstance(fields, dict)
    return Prior.of(fields)


def config_digest(loaded: LoadedModel) -> str:
    """Return the sha256 of the architecture in a model's configuration, without file names, versions and dtypes."""
    own = {key: value for key, value in loaded.model.config.to_dict().items() if key not in _VOLATILE}
    return hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()


def predicted_trace(options: SiteMenu) -> Sensitivity | None:
    """Return the predicted KL of one site at 0.1 to 0.9 of full χ.

    None for a unit, whose options change several sites together, and for a site that only stays dense.
    """
    pairs = zip(options.choices, options.cost, strict=True)
    nested = {choice.chi: float(cost) for choice, cost in pairs if isinstance(choice, Choice) and _nested(choice)}
    if not nested:
        return None
    chis, kl = _at_levels(nested, min(options.sites[0].shape()))
    return Sensitivity(source="predicted", chi=chis, kl=kl)


def predicted_widths(options: SiteMenu) -> WidthSensitivity | None:
    """Return the predicted KL of a unit at 0.1 to 0.9 of the width of its bond, without factors.

    None for a site without a bond, and for a unit whose menu has no widths without factors.
    """
    plain: dict[int, float] = {}
    for choice, cost in zip(options.choices, options.cost, strict=True):
        if isinstance(choice, Joint) and all(one.is_plain and len(one.widths) == 1 for one in choice.choices):
            [width] = choice.choices[0].widths
            plain[width] = float(cost)
    if not plain:
        return None
    widths, kl = _at_levels(plain, options.sites[0].cuts[0].groups)
    return WidthSensitivity(source="predicted", width=widths, kl=kl)


def _at_levels(costs: Mapping[int, float], full: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return the known places nearest to 0.1 to 0.9 of the full one, ascending, and their costs."""
    places = np.array(sorted(costs))
    found = sorted({int(places[np.argmin(np.abs(places - level * full))]) for level in _LEVELS})
    return tuple(found), tuple(_rounded(costs[place]) for place in found)


def _nested(choice: Choice) -> bool:
    return choice.topology.removeprefix("pivoted-") == "lowrank"


def _indices(menu: Menu, schedule: Schedule, price: Price) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the menu index of every site's choice; if the menu lacks it, of the largest option that takes no more."""
    found = []
    for options in menu.sites:
        choice = options.taken(schedule)
        if choice in options.choices:
            found.append(options.choices.index(choice))
        else:
            stored = price(options.site, choice)
            found.append(max(0, int(np.searchsorted(options.parameters, stored, side="right")) - 1))
    return np.array(found, dtype=np.int64)


def _site(site: Site, choice: Choice, widths: WidthSensitivity | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": site.name,
        "block": site.block,
        "family": site.family,
        "shape": [site.out_features, site.in_features],
        "topology": choice.topology,
        "parameters": choice_parameters(site, choice),
    }
    if choice.widths:
        entry["bonds"] = [_bond(*pair, widths) for pair in zip(site.cuts, choice.widths, strict=True)]
    if choice.is_sparse:
        entry["entries"] = choice.chi
    if choice.bits:
        entry["bits"] = choice.bits
    if choice.keeps_entries:
        entry["metric"] = choice.metric
    if choice.is_factored:
        legs = resolve(choice.topology, *site.shape(choice.widths))
        entry |= {"chi": choice.chi, "metric": choice.metric, "out_legs": legs.out_legs, "in_legs": legs.in_legs}
    if site.dense_because:
        entry["dense_because"] = site.dense_because
    return entry


def _bond(cut: Cut, width: int, widths: WidthSensitivity | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": cut.bond, "side": "out" if cut.of_rows else "in"}
    entry |= {"groups": cut.groups, "width": width}
    if widths is not None and not cut.of_rows:
        entry["sensitivity"] = widths.model_dump(mode="json")
    return entry


def _learned(options: SiteMenu, site: Site, offset: float, traces: Mapping[str, Sensitivity] | None) -> dict[str, Any]:
    if site.dense_because:
        return {}
    trace = (traces or {}).get(site.name) or predicted_trace(options)
    entry: dict[str, Any] = {"offset": _rounded(offset)}
    return entry if trace is None else entry | {"sensitivity": trace.model_dump(mode="json")}


def _rounded(value: float) -> float:
    return float(f"{float(value):.{_DIGITS}g}")
