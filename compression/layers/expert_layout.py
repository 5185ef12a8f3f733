"""Describes how a fused layer of experts stores its matrices, and what it computes between them.

Knows torch modules only. The layouts are those of transformers 5: `gate_up_proj` (or `up_proj`) and `down_proj` hold
the matrices of all experts, each as (out, in) or transposed, with the rows of gate and up in sequence or in turn.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["ExpertLayout"]


@dataclass(frozen=True)
class ExpertLayout:
    """Describes how a fused layer stores its matrices and what it computes between them.

    Attributes:
        origin: the fused layer without its tensors; it knows the activation.
        gated: whether a gate multiplies the hidden values; gate and up are then stored in one tensor.
        transposed: whether matrices are stored as (in, out).
        interleaved: whether rows of gate and up alternate; otherwise all of gate come first.
        biased: whether the matrices have biases.
        routed: whether the layer is told the experts of each row; otherwise it receives equally many rows for each
            expert, in the order of the experts.
    """

    origin: nn.Module
    gated: bool
    transposed: bool
    interleaved: bool
    biased: bool
    routed: bool

    @classmethod
    def of(cls, fused: nn.Module) -> ExpertLayout | None:
        """Returns the layout of a fused layer, or None if a module is none or one of an unknown layout."""
        tensors = dict(fused.named_parameters())
        first, down = tensors.get("gate_up_proj", tensors.get("up_proj")), tensors.get("down_proj")
        if (
            first is None
            or down is None
            or first.ndim != 3
            or down.ndim != 3
            or next(fused.buffers(), None) is not None
        ):
            return None
        gated = "gate_up_proj" in tensors
        name, parts = "gate_up_proj" if gated else "up_proj", 2 if gated else 1
        straight = first.shape[1] == parts * down.shape[2] and first.shape[2] == down.shape[1]
        transposed = first.shape[2] == parts * down.shape[1] and first.shape[1] == down.shape[2]
        matrices, biases = {name, "down_proj"}, {f"{name}_bias", "down_proj_bias"}
        if (
            len(first) != len(down)
            or not (straight or transposed)
            or tensors.keys() not in (matrices, matrices | biases)
        ):
            return None
        origin = copy.copy(fused)
        vars(origin)["_parameters"] = {}
        interleaved = not getattr(fused, "is_concatenated", True)
        arguments = list(inspect.signature(fused.forward).parameters.values())
        routed = sum(each.kind != each.KEYWORD_ONLY for each in arguments) > 1
        return cls(origin, gated, not straight, interleaved, len(tensors) > 2, routed)

    @property
    def first(self) -> str:
        """Name of the tensor that holds the matrices that read the layer's input."""
        return "gate_up_proj" if self.gated else "up_proj"

    @property
    def parts(self) -> list[str]:
        """Names of the matrices that read the layer's input, in the order of `split`."""
        return ["gate_proj", "up_proj"] if self.gated else ["up_proj"]

    @property
    def names(self) -> list[str]:
        """Names of the fused tensors."""
        names = [self.first, "down_proj"]
        return names + [f"{name}_bias" for name in names] if self.biased else names

    def hidden(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        """Returns what an expert makes of the outputs of its first matrices, each (…, width)."""
        if gate is None:
            values: torch.Tensor = self.origin.act_fn(up)  # type: ignore[operator]
        elif hasattr(self.origin, "_apply_gate"):
            joined = torch.stack((gate, up), -1).flatten(-2) if self.interleaved else torch.cat((gate, up), -1)
            values = self.origin._apply_gate(joined)  # type: ignore[operator]
        else:
            values = self.origin.act_fn(gate) * up  # type: ignore[operator]
        return values

    def split(self, values: torch.Tensor, axis: int = 0) -> Sequence[torch.Tensor]:
        """Returns the rows of gate and of up along an axis, or those of up alone."""
        if not self.gated:
            return (values,)
        if self.interleaved:
            return torch.unflatten(values, axis, (-1, 2)).unbind(axis + 1)
        return values.chunk(2, axis)

    def whole(self, tensors: Mapping[str, torch.Tensor], training: bool) -> nn.Module:
        """Returns a fused layer with these tensors, by the names in `names`, without gradients."""
        fused = copy.copy(self.origin)
        parameters = {name: nn.Parameter(values.detach(), requires_grad=False) for name, values in tensors.items()}
        vars(fused)["_parameters"] = parameters
        return fused.train(training)

    def joined(self, parts: Sequence[torch.Tensor], axis: int = 0) -> torch.Tensor:
        """Returns the rows from which `split` makes these parts."""
        if self.interleaved:
            return torch.stack(tuple(parts), axis + 1).flatten(axis, axis + 1)
        return torch.cat(tuple(parts), axis)
