"""Finds out by one short pass which matrices a model uses as a search needs it, and why the others must stay dense.

A module may look like a linear map and be none: routers give several outputs, some weights are read without a call of
their module, and some matrices do not act on the prediction. Calibration, decomposition and repair would fail there, or
give wrong figures. Knows a causal language model and its sites; does not know texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from compression.bonds import tolerance
from compression.sites import Site, dense_weight, expert_of, first_of_kind

__all__ = ["reach_by_kind", "with_reach"]

_ROWS, _TOKENS = 2, 8


@dataclass
class _Use:
    """How a site is used in one pass: the number of calls, whether a gradient reaches it, and what is wrong."""

    calls: int = 0
    gradient: bool = False
    wrong: list[str] = field(default_factory=list)


def with_reach(model: nn.Module, sites: Sequence[Site]) -> tuple[Site, ...]:
    """Returns the sites; one that cannot be calibrated says why in `dense_because`.

    A site must run once in a pass, read one row per token as its only argument, give the product with its weight plus
    its bias and nothing else, and act on the prediction. An expert need not be reached by a short text.

    Args:
        model: the dense model in evaluation mode, without gradients; maps `input_ids` to logits and has
            `get_input_embeddings()`.
        sites: its sites.
    """
    uses = {site.name: _Use() for site in sites if not site.dense_because}
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    hooks = [embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())]
    hooks += [
        model.get_submodule(site.name).register_forward_hook(_watch(uses[site.name], site), with_kwargs=True)
        for site in sites
        if site.name in uses
    ]
    try:
        table = embeddings.weight
        ids = torch.arange(_ROWS * _TOKENS, device=table.device).view(_ROWS, _TOKENS) % len(table)
        with torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits
            if logits.requires_grad:
                logits.float().square().sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(
        replace(site, dense_because=_reason(site, uses[site.name])) if site.name in uses else site for site in sites
    )


def reach_by_kind(model: nn.Module, sites: Sequence[Site]) -> tuple[Site, ...]:
    """Returns what `with_reach` returns, but looks at one block of every kind; other blocks of its kind are alike."""
    prefix, like = first_of_kind(model)
    found = with_reach(model, [site for site in sites if like[site.block] == site.block])
    because = {site.name: site.dense_because for site in found}
    return tuple(
        replace(
            site,
            dense_because=because[site.name.replace(f"{prefix}.{site.block}.", f"{prefix}.{like[site.block]}.", 1)],
        )
        for site in sites
    )


def _watch(use: _Use, site: Site) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: object) -> None:
        use.calls += 1
        if len(args) != 1 or keywords or not isinstance(args[0], torch.Tensor):
            use.wrong.append("reads more than one tensor")
        elif not isinstance(output, torch.Tensor):
            use.wrong.append("gives more than one tensor")
        elif args[0].shape[:-1].numel() != _ROWS * _TOKENS and expert_of(site) is None:
            use.wrong.append("does not read one row for each token")
        elif not _is_product(module, args[0], output):
            use.wrong.append("computes more than the product with its weight")
        elif output.requires_grad:
            output.register_hook(partial(_note, use))  # type: ignore[no-untyped-call]

    return hook


def _note(use: _Use, gradient: torch.Tensor) -> None:
    use.gradient = True


@torch.no_grad()
def _is_product(module: nn.Module, inputs: torch.Tensor, output: torch.Tensor) -> bool:
    bias = getattr(module, "bias", None)
    expected = functional.linear(inputs, dense_weight(module).to(inputs.dtype), bias)
    if output.shape != expected.shape:
        return False
    difference, scale = (output - expected).float().abs(), expected.float().abs()
    return not difference.numel() or bool(difference.max() <= tolerance(output.dtype) * scale.max())


def _reason(site: Site, use: _Use) -> str:
    """Why a site cannot be calibrated; empty if it can."""
    if use.wrong:
        return use.wrong[0]
    if not use.calls:
        return "" if expert_of(site) else "its weight is used without a call of its module"
    if use.calls > 1 and expert_of(site) is None:
        return f"runs {use.calls} times in a pass"
    return "" if use.gradient or expert_of(site) else "the prediction does not depend on it"
