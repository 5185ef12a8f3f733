"""Prepares the compressed modules of a model without weights for an engine that fills them tensor by tensor.

Such an engine, for example vLLM, looks at the classes of modules to decide which of them it fuses, compiles a model for
any number of tokens at once, and hands each tensor of a weight file to the module that it belongs to. Knows torch
modules only; does not know an engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from compression.bonds import KEPT
from compression.layers.mpo_linear import MPOLinear
from compression.layers.routes import Plan, default_plan
from compression.layers.skeleton import check_places
from compression.refusal import Refusal

__all__ = ["Absent", "ServedMPO", "serve_"]


class ServedMPO(MPOLinear):
    """An MPO that is made without values and takes its tensors in any order; it has one route for all calls."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take tensors of a weight file by their names in this layer; returns the names that were taken.

        The numbers in `KEPT` and the empty tensor in the place of the dense weight are taken and dropped.

        Raises:
            ValueError: the layer has no such tensor, or it has another shape.
        """
        found = set()
        for name, values in weights:
            found.add(name)
            if name in KEPT or (name == "weight" and not values.numel()):
                continue
            own: torch.Tensor | None = getattr(self, name, None) if name in (*self._stored, "bias") else None
            if own is None or own.shape != values.shape:
                expected = "no such tensor" if own is None else f"shape {tuple(own.shape)}"
                raise Refusal(f"{name} has shape {tuple(values.shape)}, and the layer needs {expected}")
            if name in self._parameters:
                assert isinstance(own, nn.Parameter)
                own.requires_grad_(False).copy_(values)
            else:
                self.register_buffer(name, values.to(next(self.parameters()).device))
        if not any(values.is_meta for values in self.state_dict().values()):
            check_places(self, dict(self.named_buffers()))
            self.prepare()
        return found


class Absent(nn.Module):
    """Stands for a matrix that has lost all rows or all columns: gives zeros, or the bias.

    Args:
        features: length of the result.
        bias: (features,) or None.
    """

    def __init__(self, features: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.features = features
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, activations: torch.Tensor) -> torch.Tensor:
        """Maps (…, anything) to (…, features)."""
        zeros = activations.new_zeros(*activations.shape[:-1], self.features)
        bias = self._parameters["bias"]
        return zeros if bias is None else zeros + bias

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take the bias and drop the matrix without entries; returns the names that were taken."""
        found = set()
        for name, values in weights:
            found.add(name)
            bias = self._parameters["bias"]
            if name == "bias" and bias is not None:
                bias.requires_grad_(False).copy_(values)
            elif values.numel() and name not in KEPT:
                raise Refusal(f"{name} has {values.numel()} entries, and the matrix has lost all of its own")
        return found


def serve_(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Make the compressed modules of a model such that an engine can fill and run them, in place.

    * MPOs become `ServedMPO`.
    * The matrices of a module that has lost all hidden units, or all heads, become `Absent`, of the size of one unit.
    * Modules around them whose parts are of different kinds get different classes, since an engine may decide once for
      all modules of a class whether it fuses their linear layers.

    Args:
        model: a model with a skeleton, see `compression.layers.skeleton.put_skeleton_`.
        shapes: the shapes of the dense matrices by module name, as `put_skeleton_` returns them.
    """
    for name in shapes:
        module = model.get_submodule(name)
        if isinstance(module, MPOLinear):
            module.plan = Plan(((1, default_plan(module.legs, module.chi).route(1)),))
            module.__class__ = ServedMPO
    for parent in {name.rpartition(".")[0] for name in shapes}:
        around = model.get_submodule(parent)
        inside = {name: part for name, part in around.named_children() if f"{parent}.{name}" in shapes}
        if any(0 in (part.in_features, part.out_features) for part in inside.values() if isinstance(part, nn.Linear)):
            _leave_out_(around, {name: shapes[f"{parent}.{name}"] for name in inside})
        around.__class__ = _kind(type(around), *(type(part) for part in around.children()))


def _leave_out_(around: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Put `Absent` for the matrices of a module without hidden units or heads; one unit of zeros is left."""
    writers = [rows for name, (rows, _) in shapes.items() if not around.get_submodule(name).out_features]
    size = getattr(around, "head_dim", 1)
    units = min(writers) // (size if isinstance(size, int) else 1)
    for name, (rows, _) in shapes.items():
        part = around.get_submodule(name)
        assert isinstance(part, nn.Linear)
        writes = not part.out_features
        around.set_submodule(name, Absent(rows // units if writes else rows, None if writes else part.bias))


_KINDS: dict[tuple[type[nn.Module], ...], type[nn.Module]] = {}


def _kind(*kinds: type[nn.Module]) -> type[nn.Module]:
    """A class like the first one, for modules whose parts are of the others; the same on every call."""
    base = kinds[0]
    return _KINDS.setdefault(kinds, type(base.__name__, (base,), {"__module__": base.__module__}))
