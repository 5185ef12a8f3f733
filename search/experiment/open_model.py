"""Open the model of a configuration: load it, find its sites and the bonds between them, and refuse what cannot work.

Knows the configuration and the model; does not know the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from compression.bonds import bonds_by_kind, discover_bonds, with_bonds
from compression.calibration.reach import reach_by_kind, with_reach
from compression.decomposition.joint_menu import multiple_of
from compression.layers.experts import experts_apart, take_apart_
from compression.layers.fused import split_fused_
from compression.layers.heads import split_heads_
from compression.layers.stacked_experts import StackedExperts
from compression.refusal import Refusal
from compression.sites import Site, Unit, discover_sites, units
from search.config import Config
from search.experiment.calibration import CHUNK_TOKENS
from search.experiment.user_files import check_files
from search.model.architecture import head_size
from search.model.budget import Budget
from search.model.devices import working_dtype
from search.model.loading import LoadedModel, load_model
from search.model.pretrained import set_attention_
from search.model.spreading import devices_of, spread_

__all__ = ["open_model", "staying_dense"]

_LARGEST_STACK = 8_192  # a second moment of so many units takes 256 MiB, and each layer has three


def open_model(
    config: Config,
    device: torch.device,
    loaded: LoadedModel | None = None,
    progress: Callable[[int], None] = lambda percent: None,
) -> tuple[LoadedModel, tuple[Site, ...]]:
    """Load the model of a configuration and find its sites.

    Args:
        loaded: the model, if it is already in memory; it may be an outline.
        progress: as for `load_model`.

    Raises:
        ValueError: the experts of a layer are to be stacked and have too many hidden units; as for
            `search.experiment.user_files.check_files`, `search.model.loading.load_model`,
            `search.model.pretrained.set_attention_`,
            `search.model.spreading.spread_` and `compression.sites.discover_sites`; the model has fewer positions than
            a calibration text has tokens; the target is below the smallest that can be had, or the size not below that
            of the dense model; `per_head` is set for a model without several heads, or `split_fused` for one without
            fused matrices; or the form needs bonds between matrices, and the model has none, or none as wide as
            `width_multiple`.
        DataUnavailable: as for `search.model.loading.load_model`.
    """
    check_files(config)
    if loaded is None:
        place, dtype = device, working_dtype(config.dtype, device)
        if config.device_map is not None:  # the whole model may not fit on one device
            place = torch.device("cpu")
        loaded = load_model(config.model, place, dtype, config.trust_remote_code, progress)
    if config.attention != "auto":
        set_attention_(loaded.model, config.attention)
    if loaded.positions is not None and loaded.positions < CHUNK_TOKENS:
        raise Refusal(
            f"model must have at least {CHUNK_TOKENS} positions, the length of the calibration texts, got "
            f"{config.model} with {loaded.positions}"
        )
    outlined = loaded.is_outline
    if config.device_map is not None:
        devices = devices_of(config.device_map, device)
        if not outlined:
            spread_(loaded.model, device, devices)
    take_apart_(loaded.model, config.experts, checked=not outlined)
    sites = discover_sites(loaded.model, shapes_only=outlined)
    if config.experts == "shared":
        _refuse_large_stacks(loaded.model)
    if config.split_fused:
        if not split_fused_(loaded.model, sites):
            raise Refusal(
                f"split_fused needs matrices of several parts (q, k, v; gate, up), and {config.model} has none"
            )
        sites = discover_sites(loaded.model, shapes_only=outlined)
    if config.per_head:
        if not (size := head_size(loaded.model)) or not split_heads_(loaded.model, sites, size):
            raise Refusal(f"per_head needs attention matrices of several heads, and {config.model} has none")
        sites = discover_sites(loaded.model, shapes_only=outlined)
    sites = (reach_by_kind if outlined else with_reach)(loaded.model, sites)
    if config.form != "factors":
        discover = bonds_by_kind if outlined else discover_bonds
        sites = with_bonds(sites, discover(loaded.model, sites))
        _refuse_without_widths(config, sites, device)
    budget = Budget.of(config, loaded.model, sites)
    if budget.least_kept >= 1:
        why = staying_dense(sites) or "they are too small"
        raise Refusal(f"no matrix of {config.model} can be made smaller: {why}")
    if budget.target_kept < budget.least_kept:
        why = f"; what stays dense is {staying}" if (staying := staying_dense(sites)) else ""
        target, _, got = budget.wanted.partition(" ")
        raise Refusal(
            f"{target} must be at least {budget.least}, the smallest {'size' if target == 'size' else 'fraction'} that "
            f"this model can keep with form {config.form}, got {got}{why}"
        )
    return loaded, sites


def staying_dense(sites: Sequence[Site]) -> str:
    """What stays dense: for each reason the share of the sites' parameters and the first matrix; largest share first.

    Returns:
        An empty text if everything can be tensorized.
    """
    total = sum(site.parameters for site in sites)
    reasons: dict[str, list[Site]] = {}
    for site in sites:
        if site.dense_because:
            reasons.setdefault(site.dense_because, []).append(site)
    ordered = sorted(reasons.items(), key=lambda pair: -sum(site.parameters for site in pair[1]))
    shares = [sum(site.parameters for site in staying) / total for _, staying in ordered]
    return ", and ".join(
        f"{share:.1%} of the parameters, such as {staying[0].name} ({reason})"
        for share, (reason, staying) in zip(shares, ordered, strict=True)
    )


def _refuse_large_stacks(model: nn.Module) -> None:
    """Refuse stacked experts whose second moments, square in all hidden units of a layer, would not fit in memory."""
    for name, experts in experts_apart(model).items():
        if isinstance(experts, StackedExperts) and experts.hidden_units > _LARGEST_STACK:
            raise Refusal(
                f"experts shared needs layers of at most {_LARGEST_STACK:,} hidden units in all experts together, and "
                f"{name} has {experts.hidden_units:,}; use experts single"
            )


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
