"""The compression prior: the winning schedule of a run with what it cost, as JSON that others can apply.

Writes plain values only; stable key order. Reading priors is not its business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compression.legs import resolve
from compression.schedule import Schedule
from compression.sites import Site
from compression.size import choice_parameters
from search.config import Config
from search.corpora import Splits
from search.models import LoadedModel
from search.runfolder import environment

__all__ = ["FORMAT", "VERSION", "build_prior"]

FORMAT, VERSION = "chisel-prior", 1


def build_prior(
    config: Config,
    loaded: LoadedModel,
    sites: Sequence[Site],
    schedule: Schedule,
    rows: Sequence[Mapping[str, object]],
    splits: Splits,
) -> dict[str, object]:
    """The content of prior.json.

    Per site: name, block, family, shape, topology, legs and χ (absent where dense), metric, parameters, and why it
    stays dense where it has to. Beside it the model's identity, the table of the run, the data by digest, the
    configuration and what it was made with.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": {"id": loaded.model_id, "digest": loaded.digest, "license": loaded.license},
        "target_kept": config.target_kept,
        "kept_fraction": sum(choice_parameters(site, schedule[site.name]) for site in sites)
        / sum(site.parameters for site in sites),
        "schedule_digest": schedule.digest,
        "sites": [_site(site, schedule) for site in sites],
        "scores": list(rows),
        "data": {
            "calibration": splits.calibration.digest,
            "search_text": splits.search_text.digest,
            "search_items": sorted(item.digest for item in splits.search_items),
            "heldout_text": splits.heldout_text.digest,
        },
        "configuration": config.definition(),
        "environment": environment(),
    }


def _site(site: Site, schedule: Schedule) -> dict[str, object]:
    choice = schedule[site.name]
    entry: dict[str, object] = {
        "name": site.name,
        "block": site.block,
        "family": site.family,
        "shape": [site.out_features, site.in_features],
        "topology": choice.topology,
    }
    if not choice.is_dense:
        legs = resolve(choice.topology, site.out_features, site.in_features)
        entry |= {"chi": choice.chi, "metric": choice.metric, "out_legs": legs.out_legs, "in_legs": legs.in_legs}
    if site.dense_because:
        entry["dense_because"] = site.dense_because
    return entry | {"parameters": choice_parameters(site, schedule[site.name])}
