"""Stacks the matrices of all experts of a layer into one, whose factors then share a basis.

Knows torch modules only. The experts of a layer read the same input and write to the same output. Stacked along their
hidden units, their matrices are those of one wide MLP, whose hidden values are multiplied by the weights that the
router gives their experts. A matrix of low rank then has one basis for all experts; in an MPO with legs such as
`mpo:8.768x1.2048`, the first core carries the index of the expert alone.
"""

from __future__ import annotations

import torch
from torch import nn

from compression.bonds import KEPT, linear_layer
from compression.layers.expert_layout import ExpertLayout
from compression.refusal import Refusal

__all__ = ["StackedExperts"]


class StackedExperts(nn.Module):
    """Computes what a fused layer of experts computes, with one matrix per role: `up_proj`, `down_proj`, `gate_proj`.

    Every row is computed for every expert, so that with few experts per row this takes longer than the fused layer.
    Hidden units may be removed from any expert; `up_proj` then stores which are left, see `compression.bonds.keep_`.

    Args:
        fused: the fused layer.

    Attributes:
        tensors: names of the tensors of the fused layer.
        num_experts: number of experts.
        hidden_units: number of hidden units of all experts together.

    Raises:
        ValueError: the module is no fused layer of a known layout, or it is not told which experts a row has.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        layout = ExpertLayout.of(fused)
        if layout is None or not layout.routed:
            raise Refusal(f"a {type(fused).__name__} is no fused layer of experts that can be stacked")
        tensors = dict(fused.named_parameters())
        self._layout, self.tensors, self.num_experts = layout, layout.names, len(tensors["down_proj"])
        rows = tensors[layout.first].mT if layout.transposed else tensors[layout.first]
        bias = tensors[f"{layout.first}_bias"] if layout.biased else None
        weights = layout.split(rows, 1)
        biases = [None] * len(weights) if bias is None else layout.split(bias, 1)
        for name, weight, shift in zip(layout.parts, weights, biases, strict=True):
            self.add_module(name, linear_layer(weight.flatten(0, 1), None if shift is None else shift.flatten()))
        down = tensors["down_proj"].mT if layout.transposed else tensors["down_proj"]
        self.hidden_units = down.shape[0] * down.shape[2]
        self.down_proj = linear_layer(down.transpose(0, 1).flatten(1), None)
        if layout.biased:
            self.down_bias = nn.Parameter(tensors["down_proj_bias"].detach().flatten(), requires_grad=False)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Returns the sum of the outputs of each row's experts; the arguments are those of `Experts.forward`."""
        weights = hidden_states.new_zeros(len(hidden_states), self.num_experts + 1)
        chosen = top_k_index.clamp_max(self.num_experts)
        weights = weights.scatter_add(1, chosen, top_k_weights.to(weights.dtype))[:, :-1]
        gate = self.gate_proj(hidden_states) if self._layout.gated else None
        hidden = self._layout.hidden(gate, self.up_proj(hidden_states))
        factors = weights.to(hidden.dtype).repeat_interleave(self.hidden_units // self.num_experts, 1)
        left = getattr(self.up_proj, KEPT[0], None)
        result: torch.Tensor = self.down_proj(hidden * (factors if left is None else factors[:, left]))
        if self._layout.biased:
            result = result + weights.to(result.dtype) @ torch.unflatten(self.down_bias, 0, (self.num_experts, -1))
        return result.to(hidden_states.dtype)

    def fused(self) -> nn.Module:
        """Returns the fused layer with these values; the matrices must be linear layers that lost no hidden units."""
        layout, count = self._layout, self.num_experts
        firsts = [self.get_submodule(name) for name in layout.parts]
        first = layout.joined([torch.unflatten(each.get_parameter("weight"), 0, (count, -1)) for each in firsts], 1)
        down = torch.unflatten(self.down_proj.get_parameter("weight"), 1, (count, -1)).transpose(0, 1)
        matrices = [values.mT.contiguous() if layout.transposed else values.contiguous() for values in (first, down)]
        if layout.biased:
            biases = layout.joined([torch.unflatten(each.get_parameter("bias"), 0, (count, -1)) for each in firsts], 1)
            matrices += [biases, torch.unflatten(self.down_bias, 0, (count, -1))]
        return layout.whole(dict(zip(layout.names, matrices, strict=True)), self.training)
