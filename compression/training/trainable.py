"""What healing trains: cores, norms and biases; everything else stays frozen.

Knows the module tree of a torch model. The stored form of an `MPOLinear` is trained as it is, so that the size of a
model never changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from compression.layers.mpo_linear import MPOLinear
from compression.refusal import Refusal

__all__ = ["captured_head_input", "frozen", "put_parameters", "trainable_"]


def trainable_(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """Ask for gradients of everything that is healed, in place, in `dtype`.

    Cores of every `MPOLinear`, and every vector of the model: norms and biases. Each becomes a parameter of its own, so
    that another model which shares the tensors is not changed.

    Returns:
        the new parameters by name; `put_parameters` with the ones from before takes it back.

    Raises:
        ValueError: the model has no `MPOLinear`.
    """
    cores = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, MPOLinear)
        for name, _ in module.named_parameters()
    }
    if not cores:
        raise Refusal("healing needs a compressed model, and no matrix of this one is compressed")
    chosen = {
        name: p for name, p in model.named_parameters() if name in cores or (p.ndim == 1 and p.is_floating_point())
    }
    model.requires_grad_(False)
    fresh = {
        name: nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=True)
        for name, parameter in chosen.items()
    }
    put_parameters(model, fresh)
    return fresh


def put_parameters(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Put parameters in their places by name; returns the ones that were there."""
    before = {}
    for name, parameter in parameters.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        before[name] = module.get_parameter(leaf)
        setattr(module, leaf, parameter)
        if isinstance(module, MPOLinear):
            module.prepare()
    return before


def frozen(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The same values in the type that the rest of the model has, without gradients."""
    dtype = next((p.dtype for name, p in model.named_parameters() if name not in parameters), torch.float32)
    return {name: nn.Parameter(p.detach().to(dtype), requires_grad=False) for name, p in parameters.items()}


@contextmanager
def captured_head_input(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """While inside, what the output head is fed is caught, (batch, length, width) a pass, and the head sees one row.

    Logits of all tokens over the whole vocabulary are thereby never made.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    caught: list[torch.Tensor] = []

    def feed(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        caught.append(args[0])
        return (args[0][:1, :1],)

    hook = head.register_forward_pre_hook(feed)
    try:
        yield caught
    finally:
        hook.remove()
