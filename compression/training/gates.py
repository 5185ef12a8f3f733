"""Gates: a factor for every output of a tensorized layer, learned in healing and absorbed by its cores afterwards.

Knows `MPOLinear` modules in a module tree. The gate of a layer is 1 + g per leg, ∏ₖ (1 + gₖ[oₖ]) for the output
(o₁, o₂, …): with `lowrank` a factor for every row of the matrix. It starts at 1, and since each leg belongs to one
core, the gated matrix is an MPO of the same bonds, so that healing with gates changes no size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compression.layers.mpo_linear import MPOLinear
from compression.numerics.gauge import stored

__all__ = ["absorb_gates_", "add_gates_"]

_GATE = "gate_"
_HOOK = "_gate_hook"


def add_gates_(model: nn.Module) -> None:
    """Give every `MPOLinear` a gate, in place: one parameter `gate_K` (out leg K,) of zeros for every core."""
    for layer in _layers(model):
        like = next(layer.parameters())
        for number, leg in enumerate(layer.legs.out_legs):
            layer.register_parameter(f"{_GATE}{number}", nn.Parameter(like.new_zeros(leg), requires_grad=False))
        setattr(layer, _HOOK, layer.register_forward_hook(_gated))


@torch.no_grad()
def absorb_gates_(model: nn.Module) -> None:
    """Multiply every gate into its cores and take it away, in place; a model without gates stays as it is."""
    for path, layer in [(path, layer) for path, layer in model.named_modules() if isinstance(layer, MPOLinear)]:
        if not hasattr(layer, _HOOK):
            continue
        pairs = zip(layer.cores, _factors(layer), strict=True)
        cores = [core * factor[:, None, None].to(core.dtype) for core, factor in pairs]
        model.set_submodule(path, MPOLinear(stored(cores, layer.legs.pivoted), layer._parameters["bias"], layer.plan))


def _layers(model: nn.Module) -> list[MPOLinear]:
    return [module for module in model.modules() if isinstance(module, MPOLinear)]


def _factors(layer: MPOLinear) -> list[torch.Tensor]:
    """1 + gₖ for every core."""
    return [1 + layer.get_parameter(f"{_GATE}{number}") for number in range(len(layer.legs.out_legs))]


def _gated(layer: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    assert isinstance(layer, MPOLinear)
    gate = torch.ones(1, device=output.device)
    for factor in _factors(layer):
        gate = torch.outer(gate, factor).flatten()
    change = (gate - 1).to(output.dtype)
    bias = layer._parameters["bias"]
    return output + change * (output if bias is None else output - bias)
