"""Takes the fused experts of a mixture apart into one module per expert, and fuses them again.

Knows torch modules only. A fused layer of experts holds one tensor (expert, out, in) for each of its matrices. Taken
apart, every matrix is an ordinary linear layer, which is found, profiled, cut and compressed like any other. The router
stays what it is: it still hands the layer the tokens, the numbers of their experts and the weights of their outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from compression.bonds import linear_layer, tolerance
from compression.layers.expert_layout import ExpertLayout
from compression.layers.stacked_experts import StackedExperts
from compression.refusal import Refusal
from compression.schedule import ExpertForm

__all__ = ["Expert", "Experts", "experts_apart", "take_apart_"]

_ROWS, _CHOSEN = 16, 2  # rows, and experts of each row, of the test that a layer computes the same when taken apart


class Expert(nn.Module):
    """Computes one expert of a mixture: maps (rows, width of the model) to the same shape.

    Args:
        layers: the matrices by name: `up_proj`, `down_proj` and, in a gated layer, `gate_proj`.
        layout: how the layer that they come from computes its hidden values.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, layers: dict[str, nn.Linear], layout: ExpertLayout) -> None:
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
        num_experts: number of experts.

    Raises:
        ValueError: the module is no fused layer of a known layout.
    """

    def __init__(self, fused: nn.Module) -> None:
        layout = ExpertLayout.of(fused)
        if layout is None:
            raise Refusal(f"a {type(fused).__name__} is no fused layer of experts of a known layout")
        tensors = dict(fused.named_parameters())
        super().__init__(_expert(tensors, number, layout) for number in range(len(tensors["down_proj"])))
        self._layout = layout
        self.tensors, self.num_experts = layout.names, len(self)

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
        for expert, chosen in zip(self, torch.split(pairs.argsort(stable=True), counts), strict=False):
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
            firsts, last = [expert.get_submodule(name) for name in layout.parts], expert.get_submodule("down_proj")
            weights = layout.joined([each.get_parameter("weight") for each in firsts]), last.get_parameter("weight")
            for name, weight in zip(layout.names, weights, strict=False):
                stacks.setdefault(name, []).append(weight.T if layout.transposed else weight)
            if layout.biased:
                stacks.setdefault(layout.names[2], []).append(
                    layout.joined([each.get_parameter("bias") for each in firsts])
                )
                stacks.setdefault(layout.names[3], []).append(last.get_parameter("bias"))
        return layout.whole({name: torch.stack(stacks[name]) for name in layout.names}, self.training)


def _expert(tensors: Mapping[str, torch.Tensor], number: int, layout: ExpertLayout) -> Expert:
    layers: dict[str, nn.Linear] = {}
    first, down = (tensors[name][number].T if layout.transposed else tensors[name][number] for name in layout.names[:2])
    shifts = [tensors[name][number] for name in layout.names[2:]]
    weights = layout.split(first)
    biases = layout.split(shifts[0]) if shifts else [None] * len(weights)
    for part, values, shift in zip(layout.parts, weights, biases, strict=True):
        layers[part] = linear_layer(values, shift)
    layers["down_proj"] = linear_layer(down, shifts[1] if shifts else None)
    return Expert(layers, layout)


def take_apart_(model: nn.Module, form: ExpertForm = "single", checked: bool = True) -> list[str]:
    """Take every fused layer of experts apart, in place, if it computes the same then.

    The test runs the layer on random rows before and after. A layer that fails it, or whose layout is unknown, stays
    fused. Layers that are not told which experts a row has are never stacked.

    Args:
        form: what the layers become.
        checked: whether the test is made, which a model on the meta device does not allow.

    Returns:
        The names of the layers that were taken apart.
    """
    names = []
    for name, module in list(model.named_modules()) if form != "fused" else ():
        layout = ExpertLayout.of(module)
        if not name or layout is None:
            continue
        apart = StackedExperts(module) if form == "shared" and layout.routed else Experts(module)
        if not checked or _same(module, apart, layout):
            model.set_submodule(name, apart.train(module.training))
            names.append(name)
    return names


def experts_apart(model: nn.Module) -> dict[str, Experts | StackedExperts]:
    """Returns the layers of experts that were taken apart, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts | StackedExperts)}


@torch.no_grad()
def _same(fused: nn.Module, apart: Experts | StackedExperts, layout: ExpertLayout) -> bool:
    """Whether a fused layer and what it was taken apart into give the same outputs; not for the meta device."""
    down = fused.down_proj
    assert isinstance(down, torch.Tensor)
    generator = torch.Generator().manual_seed(0)
    count = apart.num_experts * _ROWS
    width = down.shape[2] if layout.transposed else down.shape[1]
    rows = torch.randn(count, width, generator=generator).to(down)
    arguments: tuple[torch.Tensor, ...] = (rows,)
    if layout.routed:
        chosen = torch.rand(count, apart.num_experts, generator=generator).argsort(1)[:, :_CHOSEN].to(down.device)
        arguments = rows, chosen, torch.rand(chosen.shape, generator=generator).to(down)
    try:
        expected, found = fused(*arguments), apart(*arguments)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return False
    if not isinstance(expected, torch.Tensor) or expected.shape != found.shape:
        return False
    scale = expected.float().abs().max()
    return bool((found - expected).float().abs().max() <= tolerance(expected.dtype) * scale)
