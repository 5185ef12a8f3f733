"""Quantizes a model in place: compressed layers, dense matrices, embeddings and head become packed integers.

Knows the module tree and the moments of its matrices; does not choose the bits of a module, which the caller does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from compression.layers.kept import kept, put_kept_
from compression.layers.mpo_linear import MPOLinear
from compression.layers.packed import PackedEmbedding, PackedLinear, PackedMatrix, PackedMPO
from compression.layers.routes import is_lowrank
from compression.numerics.group_integers import Metric, quantize
from compression.numerics.packed_size import GROUP
from compression.refusal import Refusal
from compression.sites import dense_weight

__all__ = ["Moments", "packed", "quantize_", "quantized"]

Moments = tuple[torch.Tensor, torch.Tensor | None] | None
"""C (in, in) and G (out, out) of the dense matrix of a module; None in place of G or of both if they are not known."""


@torch.no_grad()
def quantize_(
    model: nn.Module,
    bits: Mapping[str, int],
    moments: Callable[[str], Moments],
    group: int = GROUP,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Quantize modules of `model` in place.

    Args:
        model: changed in place.
        progress: called with the number of modules done.
        bits, moments, group: as for `quantized`, which also says what is raised.
    """
    for done, (name, module) in enumerate(quantized(model, bits, moments, group), 1):
        model.set_submodule(name, module)
        progress(done)


@torch.no_grad()
def quantized(
    model: nn.Module, bits: Mapping[str, int], moments: Callable[[str], Moments], group: int = GROUP
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the packed form of modules of `model` by name, embeddings first.

    A matrix that a linear layer shares with an embedding is stored once.

    Args:
        bits: bits per number, see `compression.numerics.packed_size`, by the name of a linear layer, `MPOLinear` or
            embedding.
        moments: returns the moments of the dense matrix of a module by name. For an embedding that shares its matrix
            with the head, they are those of the head.
        group: see `compression.numerics.group_integers.quantize`.

    Raises:
        ValueError: a name belongs to another kind of module, or `compression.numerics.group_integers.quantize` rejects
            a value.
    """
    tables: dict[int, tuple[str, PackedMatrix]] = {}
    modules = {name: model.get_submodule(name) for name in bits}
    embeddings = [name for name, module in modules.items() if isinstance(module, nn.Embedding)]
    for name in [*embeddings, *(name for name in bits if name not in embeddings)]:
        module = modules[name]
        shared = tables.get(id(getattr(module, "weight", None))) if isinstance(module, nn.Linear) else None
        if shared is not None:
            yield name, PackedLinear(shared[1], _bias(module), tied=shared[0])
        else:
            numbers = kept(module)
            new = put_kept_(packed(module, bits[name], group, _of_kept(numbers, moments(name))), numbers)
            if isinstance(new, PackedEmbedding):
                tables[id(module.weight)] = name, new.packed
            yield name, new


@torch.no_grad()
def packed(module: nn.Module, bits: int, group: int = GROUP, moments: Moments = None) -> nn.Module:
    """Returns the packed form of a module.

    For a `pivoted-lowrank` layer with a known C, the last core is rounded first; then the tail is solved again
    with the rounded core, so it compensates for the rounding. Cores of other topologies are rounded independently.

    Raises:
        ValueError: the module is of another kind, or `compression.numerics.group_integers.quantize` rejects a value.
    """
    if isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:
        return PackedEmbedding(_matrix(module.weight, bits, group, moments, module.weight.dtype))
    if isinstance(module, MPOLinear):
        return PackedMPO(module, _cores(module, bits, group, moments and moments[0]))
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
        raise Refusal(f"a {type(module).__name__} cannot be quantized")
    return PackedLinear(_matrix(dense_weight(module), bits, group, moments, weight.dtype), _bias(module))


def _of_kept(numbers: Mapping[str, torch.Tensor], moments: Moments) -> Moments:
    """The moments of the rows and columns that are left, see `compression.layers.kept`."""
    if moments is None:
        return None

    def part(moment: torch.Tensor, name: str) -> torch.Tensor:
        if name not in numbers:
            return moment
        index = numbers[name].to(moment.device).long()
        return moment[index][:, index]

    inputs, gradients = moments
    return part(inputs, "kept_columns"), None if gradients is None else part(gradients, "kept_rows")


def _cores(layer: MPOLinear, bits: int, group: int, moment: torch.Tensor | None) -> dict[str, PackedMatrix]:
    state = {name: values for name, values in layer.state_dict().items() if name.startswith(("core_", "tail_"))}
    dtype = layer.cores[-1].dtype
    if moment is None or not (layer.legs.pivoted and is_lowrank(layer.legs)):
        return {name: _matrix(values, bits, group, None, dtype) for name, values in state.items()}
    tail, inner = state["tail_0"].double(), state["core_1"].flatten(1).double()
    first = _matrix(inner, bits, group, (moment, None), dtype)
    rounded = first.matrix(torch.float32).double()
    seen = rounded @ moment.double() @ rounded.T
    seen.diagonal().add_(1e-6 * seen.diagonal().mean().clamp_min(1e-12))
    tail = torch.linalg.solve(seen, rounded @ moment.double() @ (tail @ inner).T).T
    return {"tail_0": _matrix(tail, bits, group, (seen, None), dtype), "core_1": first}


def _matrix(values: torch.Tensor, bits: int, group: int, moments: Moments, dtype: torch.dtype) -> PackedMatrix:
    """Quantizes a tensor as a matrix. Its columns are the last axis, or the one before if the last has length 1."""
    flat = values.squeeze(-1) if values.ndim > 2 and values.shape[-1] == 1 else values
    flat = flat.reshape(-1, flat.shape[-1])
    metric = None if moments is None else Metric(*moments)
    return PackedMatrix(quantize(flat, bits, group, metric), flat.shape[1], bits, group, dtype)


def _bias(module: nn.Module) -> torch.Tensor | None:
    bias = getattr(module, "bias", None)
    return bias.detach() if isinstance(bias, torch.Tensor) else None
