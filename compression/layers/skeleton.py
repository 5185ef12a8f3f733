"""Describes the compressed modules of a model as plain values, and creates such modules without weights.

Knows torch modules only. A folder of weights stores these descriptions with its tensors. Its reader first puts the
described modules into a model, on the meta device, and then loads the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import nn

from compression.bonds import keep_, linear_layer
from compression.layers.experts import Experts
from compression.layers.fused import FusedLinear
from compression.layers.heads import HeadLinear
from compression.layers.kept import kept
from compression.layers.mpo_linear import MPOLinear
from compression.layers.packed import PackedEmbedding, PackedLinear, PackedMatrix, PackedMPO, empty_packed
from compression.layers.sparse_linear import SparseLinear, empty_sparse
from compression.layers.stacked_experts import StackedExperts
from compression.numerics.gauge import PivotedCore
from compression.numerics.legs import Legs, leg_name, resolve
from compression.refusal import Refusal
from compression.sites import dense_weight

__all__ = ["LARGEST", "check_places", "describe", "empty_mpo", "put_skeleton_"]

LARGEST = 1 << 20
"""Largest allowed bond, part size or group size in a description."""

_CUT = ("mpo", "packed-mpo", "packed-linear", "linear")  # the kinds that can have lost rows or columns

_APART: Mapping[str, type[Experts | StackedExperts]] = {"experts": Experts, "stacked-experts": StackedExperts}


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Returns a description of every compressed module of `model` by qualified name, containers before their parts.

    Returns:
        * For an `MPOLinear`: {"kind": "mpo", "topology": see `compression.numerics.legs.leg_name`, "bonds": inner
          bonds, "bias": whether it has one}.
        * For a `HeadLinear`: {"kind": "heads", "size", "along_output"}. Its parts have their own descriptions.
        * For a `FusedLinear`: {"kind": "fused", "parts": {name: [[start, stop], …]}}. Its parts have their own
          descriptions.
        * For packed modules: {"kind": "packed-mpo", "packed-linear" or "packed-embedding", "bits", "group"} and, for an
          MPO, "topology", "bonds" and "bias". A packed linear layer has "bias" and "tied": the name of the embedding
          that holds its matrix, or "".
        * For a linear layer that lost rows or columns: {"kind": "linear", "bias"}.
        * For a `SparseLinear`: {"kind": "sparse", "kept": the number of entries that are stored, "bias"}, and "bits"
          and "group" if these are packed.
        * For a layer of experts that was taken apart: {"kind": "experts" or "stacked-experts", "tensors": names of the
          fused tensors}. Its matrices have their own descriptions.

        All that lost rows or columns also have "shape": those that are left.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, MPOLinear):
            topology, bonds = leg_name(module.legs), list(module.bonds)
            found[name] = {"kind": "mpo", "topology": topology, "bonds": bonds, "bias": module.bias is not None}
        elif isinstance(module, HeadLinear):
            found[name] = {"kind": "heads", "size": module.size, "along_output": module.along_output}
        elif isinstance(module, Experts | StackedExperts):
            kind = next(kind for kind, made in _APART.items() if isinstance(module, made))
            found[name] = {"kind": kind, "tensors": module.tensors}
        elif isinstance(module, FusedLinear):
            parts = {part: [list(run) for run in runs] for part, runs in module.runs.items()}
            found[name] = {"kind": "fused", "parts": parts}
        elif isinstance(module, PackedMPO):
            topology, bonds = leg_name(module.legs), list(module.bonds)
            plain = {"kind": "packed-mpo", "topology": topology, "bonds": bonds, "bias": module.bias is not None}
            found[name] = {**plain, **_packing(next(iter(module.packed.values())))}
        elif isinstance(module, PackedLinear):
            plain = {"kind": "packed-linear", "bias": module.bias is not None, "tied": module.tied}
            found[name] = {**plain, **_packing(module.stored)}
        elif isinstance(module, PackedEmbedding):
            found[name] = {"kind": "packed-embedding", **_packing(module.packed)}
        elif isinstance(module, SparseLinear):
            plain = {"kind": "sparse", "kept": module.kept, "bias": module.bias is not None}
            found[name] = plain if module.packed is None else {**plain, **_packing(module.packed)}
        elif kept(module):
            found[name] = {"kind": "linear", "bias": module.bias is not None}
        if name in found and kept(module):
            found[name]["shape"] = [module.out_features, module.in_features]
    return found


def put_skeleton_(model: nn.Module, descriptions: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
    """Replace dense modules of `model` by the described ones, without values.

    Returns:
        The shapes of the matrices that were replaced, by module name.

    Raises:
        ValueError: a description does not have the form that `describe` returns, or does not fit the module of its
            name.
    """
    makers: Mapping[str, Callable[..., nn.Module]] = {
        "mpo": _mpo,
        "heads": _heads,
        "fused": _fused,
        "packed-mpo": _packed_mpo,
        "packed-linear": _packed_linear,
        "packed-embedding": _packed_embedding,
        "linear": _linear,
        "sparse": _sparse,
    }
    shapes: dict[str, tuple[int, ...]] = {}
    # Containers before their parts, and layers that share a matrix after the embedding that holds it.
    for name in sorted(descriptions, key=lambda name: (bool(_get(descriptions[name], "tied")), name)):
        description = descriptions[name]
        if _get(description, "kind") in _APART:
            _take_apart_(model, name, description)
            continue
        try:
            dense = model.get_submodule(name)
            weight = dense.weight if isinstance(dense, nn.Embedding) else dense_weight(dense)
            shapes[name] = shape = tuple(weight.shape)
        except AttributeError:
            raise Refusal(f"compressed module {name:.200}: the model has no matrix of this name") from None
        kind = _get(description, "kind")
        if kind not in makers:
            kinds = " or ".join((*makers, *_APART))
            raise Refusal(f"compressed module {name}: kind must be {kinds}, got {kind!r:.80}")
        try:
            if _get(description, "tied"):
                holder = model.get_submodule(description["tied"])
                model.set_submodule(name, _tied(dense, holder, shape, description))
            else:
                left = _left(shape, description)
                numbers = (torch.empty(size, dtype=torch.int32, device="meta") for size in left)
                model.set_submodule(name, keep_(makers[kind](dense, left, description), shape, *numbers))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise Refusal(f"compressed module {name} does not fit a matrix {shape}: {error}") from None
    _check_bonds(model, shapes)
    return shapes


def _take_apart_(model: nn.Module, name: str, description: Mapping[str, Any]) -> None:
    """Take a fused layer of experts apart, without looking at its values."""
    try:
        apart = _APART[description["kind"]](model.get_submodule(name))
    except (AttributeError, ValueError) as error:
        raise Refusal(f"compressed module {name:.200}: {error}") from None
    if description.get("tensors") != apart.tensors:
        raise Refusal(
            f"compressed module {name}: tensors must be {apart.tensors}, got {description.get('tensors')!r:.80}"
        )
    model.set_submodule(name, apart)


def _check_bonds(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a module in which some matrices are cut and others are not, or not to the same share."""
    for parent in {name.rpartition(".")[0] for name in shapes if kept(model.get_submodule(name))}:
        shares: dict[Fraction, str] = {}
        for name, layer in model.get_submodule(parent).named_children():
            rows, columns = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
            if rows is not None and columns is not None:
                whole = prod(shapes.get(f"{parent}.{name}", (rows, columns)))
                shares.setdefault(Fraction(rows * columns, whole), name)
        if len(shares) > 1:
            one, other = list(shares.items())[:2]
            raise Refusal(
                f"the matrices of {parent} must all be cut to the same share, but {one[1]} keeps {one[0]} and "
                f"{other[1]} keeps {other[0]}"
            )


def _left(shape: tuple[int, ...], description: Mapping[str, Any]) -> tuple[int, ...]:
    """The rows and columns that are left of a dense matrix of this shape."""
    if "shape" not in description:
        return shape
    left = description["shape"]
    allowed = description["kind"] in _CUT and isinstance(left, list) and len(left) == len(shape)
    if not allowed or not all(type(one) is int and 0 <= one <= size for one, size in zip(left, shape, strict=True)):
        raise Refusal(
            f"shape must be the rows and columns left of a {' or '.join(_CUT)} module, each at most that of the dense "
            f"matrix, got {left!r:.80}"
        )
    return tuple(left)


def _linear(dense: nn.Module, shape: tuple[int, ...], description: Mapping[str, Any]) -> nn.Linear:
    dtype = dense_weight(dense).dtype
    return linear_layer(
        torch.empty(shape, device="meta", dtype=dtype), _empty_bias(description["bias"], shape[0], dense)
    )


def _sparse(dense: nn.Module, shape: tuple[int, ...], description: Mapping[str, Any]) -> SparseLinear:
    bias, dtype = _empty_bias(description["bias"], shape[0], dense), dense_weight(dense).dtype
    packing = _stated(description) if "bits" in description else None
    return empty_sparse(shape[0], shape[1], description["kept"], bias, dtype, packing)


def _mpo(dense: nn.Module, shape: tuple[int, ...], description: Mapping[str, Any]) -> MPOLinear:
    legs, bonds = resolve(description["topology"], *shape), description["bonds"]
    inner = len(legs.out_legs) - 1
    if not isinstance(bonds, list) or len(bonds) != inner or not all(_is_size(bond) for bond in bonds):
        raise Refusal(f"bonds must be {inner} integers of 1 to {LARGEST}, got {bonds!r:.80}")
    return empty_mpo(legs, bonds, _empty_bias(description["bias"], shape[0], dense), dense_weight(dense).dtype)


def empty_mpo(legs: Legs, bonds: Sequence[int], bias: torch.Tensor | None, dtype: torch.dtype) -> MPOLinear:
    """Returns a layer on the meta device with these inner bonds; raises ValueError for a bond larger than needed."""
    cores: list[torch.Tensor | PivotedCore] = []
    for number, (left, right) in enumerate(pairwise([1, *bonds, 1])):
        core_shape = (left, legs.out_legs[number], legs.in_legs[number], right)
        rows = prod(core_shape[:3])
        if legs.pivoted and number < len(bonds):
            if rows < right:
                raise Refusal(f"the bond after core {number} must be at most {rows}, got {right}")
            tail = torch.empty(rows - right, right, device="meta", dtype=dtype)
            cores.append(PivotedCore(tail, torch.empty(rows, device="meta", dtype=torch.int64), core_shape))
        else:
            cores.append(torch.empty(core_shape, device="meta", dtype=dtype))
    return MPOLinear(cores, bias)


def check_places(layer: MPOLinear | PackedMPO, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check the stored row numbers of a pivoted layer, which would otherwise be used as indices unseen.

    Args:
        tensors: tensors by their names in the layer; those that are no row numbers are ignored.

    Raises:
        ValueError: the numbers of a core are not different rows of it.
    """
    for number, (left, outputs, inputs) in enumerate(
        zip((1, *layer.bonds), layer.legs.out_legs, layer.legs.in_legs, strict=True)
    ):
        places, rows = tensors.get(f"places_{number}"), left * outputs * inputs
        if places is None:
            continue
        values = places.flatten().tolist()
        if len(set(values)) < len(values) or not all(0 <= value < rows for value in values):
            raise Refusal(f"places_{number} must be different row numbers from 0 to {rows - 1}")


def _heads(dense: nn.Module, shape: tuple[int, ...], description: Mapping[str, Any]) -> HeadLinear:
    size, along_output = description["size"], description["along_output"]
    side = shape[0] if along_output is True else shape[1]
    if not _is_size(size) or type(along_output) is not bool or side % size:
        raise Refusal(f"size must divide {side} and along_output be true or false, got {size!r} and {along_output!r}")
    bias = _empty_bias(getattr(dense, "bias", None) is not None, shape[0], dense)
    return HeadLinear(torch.empty(shape, device="meta", dtype=dense_weight(dense).dtype), bias, size, along_output)


def _fused(dense: nn.Module, shape: tuple[int, ...], description: Mapping[str, Any]) -> FusedLinear:
    parts = description["parts"]
    runs = [run for part in parts.values() for run in part]
    sizes = [stop - start for start, stop in runs]
    if not all(map(_is_size, sizes)) or sorted(row for run in runs for row in range(*run)) != [*range(shape[0])]:
        raise Refusal(f"parts must hold each of the {shape[0]} rows once, as [start, stop] of rows, got {parts!r:.80}")
    if not all(isinstance(name, str) and name.isidentifier() for name in parts):
        raise Refusal(f"the names of parts must be words, got {list(parts)!r:.80}")
    bias = _empty_bias(getattr(dense, "bias", None) is not None, shape[0], dense)
    return FusedLinear(torch.empty(shape, device="meta", dtype=dense_weight(dense).dtype), bias, parts)


def _packed_mpo(dense: nn.Module, shape: tuple[int, ...], description: Mapping[str, Any]) -> PackedMPO:
    layer = _mpo(dense, shape, description)
    cores = {name: values for name, values in layer.state_dict().items() if name.startswith(("core_", "tail_"))}
    packed = {}
    for name, values in cores.items():
        columns = values.shape[-2] if values.ndim > 2 and values.shape[-1] == 1 else values.shape[-1]
        packed[name] = empty_packed(values.numel() // columns, columns, *_stated(description), values.dtype)
    return PackedMPO(layer, packed)


def _packed_linear(dense: nn.Module, shape: tuple[int, ...], description: Mapping[str, Any]) -> PackedLinear:
    weight = dense_weight(dense)
    matrix = empty_packed(shape[0], shape[1], *_stated(description), weight.dtype)
    return PackedLinear(matrix, _empty_bias(description["bias"], shape[0], dense))


def _tied(dense: nn.Module, holder: nn.Module, shape: tuple[int, ...], description: Mapping[str, Any]) -> PackedLinear:
    if not isinstance(holder, PackedEmbedding) or holder.packed.columns != shape[1]:
        raise Refusal(f"tied must name a packed embedding with {shape[1]} columns, got {description['tied']!r}")
    return PackedLinear(holder.packed, _empty_bias(description["bias"], shape[0], dense), description["tied"])


def _packed_embedding(dense: nn.Module, shape: tuple[int, ...], description: Mapping[str, Any]) -> PackedEmbedding:
    assert isinstance(dense.weight, torch.Tensor)
    return PackedEmbedding(empty_packed(shape[0], shape[1], *_stated(description), dense.weight.dtype))


def _stated(description: Mapping[str, Any]) -> tuple[int, int]:
    return description["bits"], description["group"]


def _packing(matrix: object) -> dict[str, int]:
    assert isinstance(matrix, PackedMatrix)
    return {"bits": matrix.bits, "group": matrix.group}


def _get(description: object, key: str) -> Any:
    return description.get(key) if isinstance(description, Mapping) else None


def _empty_bias(wanted: object, outputs: int, dense: nn.Module) -> torch.Tensor | None:
    return torch.empty(outputs, device="meta", dtype=dense_weight(dense).dtype) if wanted else None


def _is_size(value: object) -> bool:
    return type(value) is int and 1 <= value <= LARGEST
