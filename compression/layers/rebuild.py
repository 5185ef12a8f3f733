"""Rebuilds the layer of a site from its choice in a schedule and its state dict.

Knows tensors and modules; does not know files.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from compression.bonds import linear
from compression.layers.skeleton import check_places, empty_mpo
from compression.numerics.legs import resolve
from compression.refusal import Refusal
from compression.schedule import Choice

__all__ = ["rebuilt"]


def rebuilt(choice: Choice, out_features: int, in_features: int, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """Returns the layer of a site whose `state_dict` was `state`, without gradients.

    Args:
        out_features, in_features: shape of the matrix, after the widths of the choice have cut it.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape or with other row numbers than the choice allows.
    """
    bias = torch.empty(out_features, device="meta") if "bias" in state else None
    layer: nn.Module
    if choice.is_plain:
        layer = linear(torch.empty(out_features, in_features, device="meta"), bias)
    else:
        legs = resolve(choice.topology, out_features, in_features)
        dtype = next((values.dtype for values in state.values() if values.is_floating_point()), torch.float32)
        layer = empty_mpo(legs, legs.bonds(choice.chi)[1:-1], bias, dtype)
        check_places(layer, state)
    try:
        layer.load_state_dict(dict(state), assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        form = f"{choice.topology} with χ {choice.chi} for {out_features} × {in_features}"
        raise Refusal(f"stored tensors do not fit {form}: {reason}") from None
    return layer.requires_grad_(False)
