"""Open the model of a configuration: load it, find its sites and the bonds between them, and refuse what cannot work.

Knows the configuration and the model; does not know the data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compression.bonds import discover_bonds, with_bonds
from compression.decomposition.joint_menu import multiple_of
from compression.layers.fused import split_fused_
from compression.layers.heads import split_heads_
from compression.numerics.legs import resolve
from compression.refusal import Refusal
from compression.schedule import Form
from compression.sites import Site, Unit, discover_sites, units
from search.config import Config
from search.experiment.calibration import CHUNK_TOKENS
from search.experiment.user_files import check_files
from search.model.architecture import head_size
from search.model.devices import working_dtype
from search.model.loading import LoadedModel, load_model
from search.model.spreading import devices_of, spread_

__all__ = ["open_model", "smallest_parameters"]


def open_model(
    config: Config, device: torch.device, loaded: LoadedModel | None = None
) -> tuple[LoadedModel, tuple[Site, ...]]:
    """Load the model of a configuration and find its sites.

    Args:
        loaded: the model, if it is already in memory.

    Raises:
        ValueError: as for `search.experiment.user_files.check_files`, `search.model.loading.load_model`,
            `search.model.spreading.spread_` and `compression.sites.discover_sites`; the model has fewer positions than
            a calibration text has tokens; the target is below the smallest kept fraction; `per_head` is set for a model
            without several heads, or `split_fused` for one without fused matrices; or the form needs bonds between
            matrices, and the model has none, or none as wide as `width_multiple`.
        DataUnavailable: as for `search.model.loading.load_model`.
    """
    check_files(config)
    if loaded is None:
        place, dtype = device, working_dtype(config.dtype, device)
        if config.device_map is not None:  # the whole model may not fit on one device
            place = torch.device("cpu")
        loaded = load_model(config.model, place, dtype, config.trust_remote_code)
    if loaded.positions is not None and loaded.positions < CHUNK_TOKENS:
        raise Refusal(
            f"model must have at least {CHUNK_TOKENS} positions, the length of the calibration texts, got "
            f"{config.model} with {loaded.positions}"
        )
    if config.device_map is not None:
        spread_(loaded.model, device, devices_of(config.device_map, device))
    sites = discover_sites(loaded.model)
    if config.split_fused:
        if not split_fused_(loaded.model, sites):
            raise Refusal(
                f"split_fused needs matrices of several parts (q, k, v; gate, up), and {config.model} has none"
            )
        sites = discover_sites(loaded.model)
    if config.per_head:
        if not (size := head_size(loaded.model)) or not split_heads_(loaded.model, sites, size):
            raise Refusal(f"per_head needs attention matrices of several heads, and {config.model} has none")
        sites = discover_sites(loaded.model)
    if config.form != "factors":
        sites = with_bonds(sites, discover_bonds(loaded.model, sites))
        _refuse_without_widths(config, sites, device)
    before = sum(site.parameters for site in sites)
    if smallest_parameters(sites, config.form) == before:
        why = next((site.dense_because for site in sites if site.dense_because), "") or "its matrices are too small"
        raise Refusal(f"no matrix of {config.model} can be made smaller: {why}")
    smallest = smallest_parameters(sites, config.form) / before
    if config.target_kept < smallest:
        raise Refusal(
            f"target_kept must be at least {smallest:.4f}, the smallest fraction that this model can keep with "
            f"form {config.form}, got {config.target_kept}"
        )
    return loaded, sites


def smallest_parameters(sites: Sequence[Site], form: Form) -> int:
    """Parameters of all sites together in their smallest form.

    Bonds have their least width, and what is left is pivoted `lowrank` with χ = 1 unless `form` is "plain".
    """
    total = 0
    for site in sites:
        rows, columns = site.shape(() if form == "factors" else tuple(cut.least for cut in site.cuts))
        total += rows * columns
        if rows and columns and form != "plain" and not site.dense_because:
            total -= max(0, rows * columns - resolve("pivoted-lowrank", rows, columns).parameters(1))
    return total


def _refuse_without_widths(config: Config, sites: Sequence[Site], device: torch.device) -> None:
    """Refuse a form or a multiple of widths that needs bonds between matrices which the model does not have."""
    joined = [unit for unit in units(sites) if isinstance(unit, Unit)]
    if not joined and (config.form == "plain" or config.width_multiple is not None):
        raise Refusal(
            f"no MLP and no attention of {config.model} can lose units by itself (its matrices are fused, shared, or "
            "read twice); use form factors without width_multiple"
        )
    widest = [unit.groups // multiple_of(unit, config.width_multiple, device.type) for unit in joined]
    if config.width_multiple is not None and max(widest) < 2:
        raise Refusal(
            f"width_multiple must be at most {max(unit.groups for unit in joined) // 2} for a choice of widths of "
            f"{config.model}, got {config.width_multiple}"
        )
