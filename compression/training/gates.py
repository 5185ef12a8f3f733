"""Adds gates, trainable factors on the outputs of tensorized layers, and multiplies them into the cores after healing.

Knows `MPOLinear` modules in a module tree; does not know losses or training. The gate of output (o₁, o₂, …) is the
product over output legs ∏ₖ (1 + gₖ[oₖ]); with `lowrank` it is one factor per row of the matrix. All gₖ start at 0, so
all gates start at 1. Each leg belongs to one core, so the gated matrix is an MPO with the same bonds, and healing with
gates does not change the size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compression.layers.kept import kept, put_kept_
from compression.layers.mpo_linear import MPOLinear
from compression.numerics.gauge import stored

__all__ = ["absorb_gates_", "add_gates_"]

_GATE = "gate_"
_HOOK = "_gate_hook"


def add_gates_(model: nn.Module) -> None:
    """Give every `MPOLinear` a gate in place: for every core K one parameter `gate_K` of zeros, shape (out leg K,)."""
    for layer in _layers(model):
        like = next(layer.parameters())
        for number, leg in enumerate(layer.legs.out_legs):
            layer.register_parameter(f"{_GATE}{number}", nn.Parameter(like.new_zeros(leg), requires_grad=False))
        setattr(layer, _HOOK, layer.register_forward_hook(_gated))


@torch.no_grad()
def absorb_gates_(model: nn.Module) -> None:
    """Multiply every gate into its cores and remove it, in place. A model without gates is not changed."""
    for path, layer in [(path, layer) for path, layer in model.named_modules() if isinstance(layer, MPOLinear)]:
        if not hasattr(layer, _HOOK):
            continue
        pairs = zip(layer.cores, _factors(layer), strict=True)
        cores = [core * factor[:, None, None].to(core.dtype) for core, factor in pairs]
        absorbed = MPOLinear(stored(cores, layer.legs.pivoted), layer._parameters["bias"], layer.plan)
        model.set_submodule(path, put_kept_(absorbed, kept(layer)))


def _layers(model: nn.Module) -> list[MPOLinear]:
    return [module for module in model.modules() if isinstance(module, MPOLinear)]


def _factors(layer: MPOLinear) -> list[torch.Tensor]:
    """Returns 1 + gₖ for every core k."""
    return [1 + layer.get_parameter(f"{_GATE}{number}") for number in range(len(layer.legs.out_legs))]


def _gated(layer: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    assert isinstance(layer, MPOLinear)
    gate = torch.ones(1, device=output.device)
    for factor in _factors(layer):
        gate = torch.outer(gate, factor).flatten()
    change = (gate - 1).to(output.dtype)
    bias = layer._parameters["bias"]
    return output + change * (output if bias is None else output - bias)
