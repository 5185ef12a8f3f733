"""Rebuilds the layer of a site from its choice in a schedule and its state dict.

Knows tensors and modules; does not know files.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from compression.bonds import keep_, linear_layer
from compression.layers.kept import check_kept
from compression.layers.packed import PackedLinear, PackedMatrix, empty_packed
from compression.layers.skeleton import check_places, empty_mpo
from compression.layers.sparse_linear import SparseLinear, empty_sparse
from compression.numerics.legs import resolve
from compression.numerics.packed_size import GROUP, GROUPS
from compression.refusal import Refusal
from compression.schedule import Choice
from compression.sites import Site

__all__ = ["rebuilt"]


def rebuilt(site: Site, choice: Choice, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """Returns the layer of a site whose `state_dict` was `state`, without gradients.

    Its shape is that which the widths of the choice leave, see `compression.sites.Site.shape`.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape, with other row numbers or with another number of
            entries in its mask than the choice allows.
    """
    rows, columns = site.shape(choice.widths)
    dense = (site.out_features, site.in_features)
    bias = torch.empty(rows, device="meta") if "bias" in state else None
    layer: nn.Module
    try:
        dtype = next((values.dtype for values in state.values() if values.is_floating_point()), torch.float32)
        packing = (choice.bits, _group(state, choice, columns)) if choice.bits else None
        if choice.is_sparse:
            layer = empty_sparse(rows, columns, choice.chi, bias, dtype, packing)
        elif packing is not None:
            layer = PackedLinear(empty_packed(rows, columns, *packing, dtype), bias)
        elif choice.is_plain:
            layer = linear_layer(torch.empty(rows, columns, device="meta"), bias)
        else:
            legs = resolve(choice.topology, rows, columns)
            layer = empty_mpo(legs, legs.bonds(choice.chi)[1:-1], bias, dtype)
            check_places(layer, state)
        keep_(layer, dense, *(torch.empty(size, device="meta", dtype=torch.int32) for size in (rows, columns)))
        check_kept(state, dense)
        layer.load_state_dict(dict(state), assign=True)
        for part in layer.modules():
            if isinstance(part, PackedMatrix):
                part.like = torch.empty(0, dtype=dtype, device=part.codes.device)
        if isinstance(layer, SparseLinear):
            layer.check()
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        in_bits = f" in {choice.bits} bits" if choice.bits else ""
        raise Refusal(
            f"stored tensors do not fit {site.name} as {choice.topology} of {rows} × {columns} with χ {choice.chi}"
            f"{in_bits}: {reason}"
        ) from None
    return layer.requires_grad_(False)


def _group(state: Mapping[str, torch.Tensor], choice: Choice, columns: int) -> int:
    """How many neighbours share a scale, from the number of scales; the usual number if none fits."""
    numbers, scales = choice.chi if choice.is_sparse else columns, state.get("packed.scales")
    found = 0 if scales is None or scales.ndim != 2 else scales.shape[1]
    return next((group for group in GROUPS if -(-numbers // group) == found), GROUP)
