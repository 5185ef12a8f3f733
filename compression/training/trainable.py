"""Selects the parameters that healing trains: cores, cut or pruned matrices, norms, biases, routers, scales.

Knows the module tree of a torch model; does not know losses or optimizers. Healing trains an `MPOLinear` in its stored
form, the values of a `SparseLinear` under its mask and the scales of a packed matrix (see
`compression.training.scales`), so the size of the model does not change. All else stays as it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from compression.layers.kept import kept
from compression.layers.mpo_linear import MPOLinear
from compression.layers.packed import PackedMatrix
from compression.layers.sparse_linear import SparseLinear
from compression.refusal import Refusal
from compression.sites import router_weights

__all__ = ["captured_head_input", "frozen", "pruned_values", "put_parameters", "scale_changes", "trainable_"]


def trainable_(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """Replace the parameters that healing trains by trainable copies in `dtype`, in place; freeze all others.

    Healing trains the cores of every `MPOLinear`, the values of every `SparseLinear`, every matrix that lost rows or
    columns, the changes of scales that `compression.training.scales` added, every router of a layer of experts, and
    every vector of the model (norms and biases). The copies keep another model that shares the tensors unchanged.

    Returns:
        The new parameters by name. To undo the change, call `put_parameters` with the original ones.

    Raises:
        ValueError: the model has neither.
    """
    compressed = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, MPOLinear | SparseLinear | PackedMatrix) or kept(module)
        for name, _ in module.named_parameters()
    }
    if not compressed:
        raise Refusal("healing needs a compressed model, and no matrix of this one is compressed")
    compressed |= router_weights(model)
    chosen = {
        name: p
        for name, p in model.named_parameters()
        if p.numel() and (name in compressed or (p.ndim == 1 and p.is_floating_point()))
    }
    model.requires_grad_(False)
    fresh = {
        name: nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=True)
        for name, parameter in chosen.items()
    }
    put_parameters(model, fresh)
    return fresh


def pruned_values(model: nn.Module) -> frozenset[str]:
    """Returns the names of the parameters that hold the entries of pruned matrices, which have one axis."""
    return frozenset(f"{path}.values" for path, module in model.named_modules() if isinstance(module, SparseLinear))


def scale_changes(model: nn.Module) -> frozenset[str]:
    """Returns the names of the parameters that change the scales of packed matrices."""
    return frozenset(f"{path}.change" for path, module in model.named_modules() if isinstance(module, PackedMatrix))


def put_parameters(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Replace parameters of `model` by name, wherever they are tied to; returns the previous ones."""
    places: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places[id(parameter)].append(name)
    before = {}
    for name, parameter in parameters.items():
        before[name] = model.get_parameter(name)
        for place in places[id(before[name])]:
            owner, _, leaf = place.rpartition(".")
            module = model.get_submodule(owner)
            setattr(module, leaf, parameter)
            if isinstance(module, MPOLinear | SparseLinear):
                module.prepare()
    return before


def frozen(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Returns copies of `parameters` without gradients, in the type of the model's other parameters."""
    dtype = next((p.dtype for name, p in model.named_parameters() if name not in parameters), torch.float32)
    return {name: nn.Parameter(p.detach().to(dtype), requires_grad=False) for name, p in parameters.items()}


@contextmanager
def captured_head_input(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Inside the context, records the input of the output head, (batch, length, width) per pass.

    The head itself is left out, so the logits are never formed: it returns zeros for a single position.

    Yields:
        A list to which every pass appends its input.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    caught: list[torch.Tensor] = []

    def catch(hidden: torch.Tensor) -> torch.Tensor:
        caught.append(hidden)
        return hidden.new_zeros(1, 1, head.out_features)

    own = head.__dict__.get("forward")
    head.forward = catch
    try:
        yield caught
    finally:
        head.__dict__.pop("forward")
        if own is not None:
            head.forward = own
