"""Takes the fused experts of a mixture apart into one module per expert, and fuses them again.

Knows torch modules only. A fused layer of experts holds one tensor (expert, out, in) for each of its matrices. Taken
apart, every matrix is an ordinary linear layer, which is found, profiled, cut and compressed like any other. The router
stays what it is: it still hands the layer the tokens, the numbers of their experts and the weights of their outputs.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from compression.bonds import linear_layer, tolerance
from compression.refusal import Refusal

__all__ = ["Expert", "Experts", "experts_apart", "take_apart_"]

_ROWS, _CHOSEN = 16, 2  # rows, and experts of each row, of the test that a layer computes the same when taken apart


@dataclass(frozen=True)
class _Layout:
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
    def of(cls, fused: nn.Module) -> _Layout | None:
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

    def split(self, values: torch.Tensor) -> Sequence[torch.Tensor]:
        """Returns the rows of gate and of up, or those of up alone."""
        if not self.gated:
            return (values,)
        return (values[::2], values[1::2]) if self.interleaved else values.chunk(2)

    def joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns the rows from which `split` makes these parts."""
        return torch.stack(tuple(parts), 1).flatten(0, 1) if self.interleaved else torch.cat(tuple(parts))


class Expert(nn.Module):
    """Computes one expert of a mixture: maps (rows, width of the model) to the same shape.

    Args:
        layers: the matrices by name: `up_proj`, `down_proj` and, in a gated layer, `gate_proj`.
        layout: how the layer that they come from computes its hidden values.
    """

    def __init__(self, layers: dict[str, nn.Linear], layout: _Layout) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._layout = layout

    def forward(self, activations: torch.Tensor) -> torch.Tensor:
        """Maps (rows, width) to (rows, width)."""
        gate = self.gate_proj(activations) if self._layout.gated else None
        result: torch.Tensor = self.down_proj(self._layout.hidden(gate, self.up_proj(activations)))
        return result


class Experts(nn.ModuleList):
    """Computes what a fused layer of experts computes, with a module per expert, numbered from 0.

    Args:
        fused: the fused layer. Without biases, matrices that it does not store transposed are views of its tensors.

    Attributes:
        tensors: names of the tensors of the fused layer.

    Raises:
        ValueError: the module is no fused layer of a known layout.
    """

    def __init__(self, fused: nn.Module) -> None:
        layout = _Layout.of(fused)
        if layout is None:
            raise Refusal(f"a {type(fused).__name__} is no fused layer of experts of a known layout")
        tensors = dict(fused.named_parameters())
        super().__init__(_expert(tensors, number, layout) for number in range(len(tensors["down_proj"])))
        self._layout = layout
        self.tensors = layout.names

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the sum of the outputs of each row's experts, (rows, width).

        Args:
            hidden_states: (rows, width).
            top_k_index: numbers of each row's experts (rows, k); numbers that no expert has are skipped.
            top_k_weights: factors of their outputs (rows, k). Without experts and factors, the rows are divided among
                the experts in order, and each row has the output of its one expert.
        """
        if top_k_index is None or top_k_weights is None:
            parts = hidden_states.chunk(len(self))
            return torch.cat([expert(part) for expert, part in zip(self, parts, strict=True)])
        result = torch.zeros_like(hidden_states)
        pairs, factors = top_k_index.flatten(), top_k_weights.flatten()
        counts = torch.bincount(pairs, minlength=len(self)).tolist()
        for expert, chosen in zip(self, pairs.argsort(stable=True).split(counts), strict=False):
            if len(chosen):
                rows = chosen // top_k_index.shape[-1]
                output = expert(hidden_states[rows]) * factors[chosen, None]
                result.index_add_(0, rows, output.to(result.dtype))
        return result

    def fused(self) -> nn.Module:
        """Returns the fused layer with the values of the experts, whose matrices must all be linear layers.

        The experts may have lost hidden units if all lost equally many.
        """
        layout, stacks = self._layout, dict[str, list[torch.Tensor]]()
        for expert in self:
            firsts = [getattr(expert, name) for name in ("gate_proj", "up_proj") if hasattr(expert, name)]
            weights = layout.joined([each.weight for each in firsts]), expert.down_proj.weight
            for name, weight in zip(layout.names, weights, strict=False):
                stacks.setdefault(name, []).append(weight.T if layout.transposed else weight)
            if layout.biased:
                stacks.setdefault(layout.names[2], []).append(layout.joined([each.bias for each in firsts]))
                stacks.setdefault(layout.names[3], []).append(expert.down_proj.bias)
        whole = copy.copy(layout.origin)
        vars(whole)["_parameters"] = {
            name: nn.Parameter(torch.stack(stacks[name]).detach(), requires_grad=False) for name in layout.names
        }
        return whole.train(self.training)


def _expert(tensors: dict[str, torch.Tensor], number: int, layout: _Layout) -> Expert:
    layers: dict[str, nn.Linear] = {}
    for name, parts in ((layout.first, ("gate_proj", "up_proj")[not layout.gated :]), ("down_proj", ("down_proj",))):
        weight, bias = tensors[name][number], tensors.get(f"{name}_bias")
        rows = weight.T if layout.transposed else weight
        several = len(parts) > 1
        weights = layout.split(rows) if several else (rows,)
        biases = [None] * len(parts) if bias is None else layout.split(bias[number]) if several else [bias[number]]
        for part, values, shift in zip(parts, weights, biases, strict=True):
            layers[part] = linear_layer(values, shift)
    return Expert(layers, layout)


def take_apart_(model: nn.Module) -> list[str]:
    """Take every fused layer of experts apart, in place, if it computes the same then.

    The test runs the layer on random rows before and after. A layer that fails it, or whose layout is unknown, stays
    fused.

    Returns:
        The names of the layers that were taken apart.
    """
    names = []
    for name, module in list(model.named_modules()):
        if name and _Layout.of(module) is not None and _same(module, apart := Experts(module)):
            model.set_submodule(name, apart.train(module.training))
            names.append(name)
    return names


def experts_apart(model: nn.Module) -> dict[str, Experts]:
    """Returns the layers of experts that were taken apart, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


@torch.no_grad()
def _same(fused: nn.Module, apart: Experts) -> bool:
    """Whether a fused layer and the layer of its single experts give the same outputs; not for the meta device."""
    down = apart[0].down_proj.weight
    assert isinstance(down, torch.Tensor)
    generator = torch.Generator().manual_seed(0)
    count = len(apart) * _ROWS
    rows = torch.randn(count, len(down), generator=generator).to(down)
    arguments: tuple[torch.Tensor, ...] = (rows,)
    if apart._layout.routed:
        chosen = torch.rand(count, len(apart), generator=generator).argsort(1)[:, :_CHOSEN].to(down.device)
        arguments = rows, chosen, torch.rand(chosen.shape, generator=generator).to(down)
    try:
        expected, found = fused(*arguments), apart(*arguments)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return False
    if not isinstance(expected, torch.Tensor) or expected.shape != found.shape:
        return False
    scale = expected.float().abs().max()
    return bool((found - expected).float().abs().max() <= tolerance(expected.dtype) * scale)
