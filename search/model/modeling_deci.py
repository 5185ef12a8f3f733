"""DeciLM for transformers, from the settings of `configuration_deci`.

vLLM, SGLang and TensorRT-LLM have the architecture built in, transformers has not: a folder of such a model brings this
file, which `trust_remote_code=True` runs. Needs torch and transformers, nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

from .configuration_deci import DeciLMConfig, hidden_units

__all__ = ["DeciLMForCausalLM"]


class _Without(nn.Module):
    """Stands for an attention, or an MLP, that a block does not have."""

    def __init__(self, results: int) -> None:
        super().__init__()
        self.results = results

    def forward(self, hidden_states: torch.Tensor, **unused: Any) -> Any:
        """Zeros; with None behind them for an attention."""
        zeros = torch.zeros_like(hidden_states)
        return zeros if self.results == 1 else (zeros, None)


class DeciLMForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """Llama with the blocks that `block_configs` states."""

    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        for layer, block in zip(self.model.layers, config.block_configs or [], strict=True):
            if block.attention.no_op:
                layer.self_attn, layer.input_layernorm = _Without(2), nn.Identity()
            else:
                self._shape_attention_(layer.self_attn, block.attention.n_heads_in_group)
            if block.ffn.no_op:
                layer.mlp, layer.post_attention_layernorm = _Without(1), nn.Identity()
            else:
                self._shape_mlp_(layer.mlp, hidden_units(block.ffn, config.hidden_size))

    def _shape_attention_(self, attention: Any, group: int) -> None:
        config, head = self.config, attention.head_dim
        bias = config.attention_bias or config.qkv_bias
        rows = config.num_attention_heads * head
        attention.num_key_value_groups = group
        attention.q_proj = nn.Linear(config.hidden_size, rows, bias)
        attention.k_proj = nn.Linear(config.hidden_size, rows // group, bias)
        attention.v_proj = nn.Linear(config.hidden_size, rows // group, bias)

    def _shape_mlp_(self, mlp: Any, units: int) -> None:
        size, bias = self.config.hidden_size, self.config.mlp_bias
        mlp.intermediate_size = units
        mlp.gate_proj, mlp.up_proj = nn.Linear(size, units, bias), nn.Linear(size, units, bias)
        mlp.down_proj = nn.Linear(units, size, bias)
