"""DeciLM, the architecture of Nemotron-NAS models: Llama whose blocks have widths of their own.

vLLM, SGLang and TensorRT-LLM have it built in, transformers has not: a folder of such a model brings this file, which
`trust_remote_code=True` runs. Needs torch and transformers, nothing else.

`block_configs` in config.json has an entry for each block. "attention" has "no_op" and "n_heads_in_group", the number
of query heads of a key/value head; all blocks have the same number of query heads. "ffn" has "no_op" and the number of
hidden units: "intermediate_size", or "ffn_mult", which some engines need; 2/3 of the size of the residual stream times
it, rounded up to a multiple of 256, are the hidden units.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["DeciLMConfig", "DeciLMForCausalLM", "hidden_units"]

_ROUNDED = 256


class _Block(dict):  # type: ignore[type-arg]
    """An entry of `block_configs`, whose values are attributes too, as engines read them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def hidden_units(ffn: dict[str, Any], size: int) -> int:
    """The number of hidden units that the "ffn" of a block states.

    Args:
        size: size of the residual stream.
    """
    if "ffn_mult" not in ffn:
        return int(ffn["intermediate_size"])
    return -(-int(2 * ffn["ffn_mult"] * size / 3) // _ROUNDED) * _ROUNDED


class DeciLMConfig(LlamaConfig):  # type: ignore[misc]
    """Llama's configuration with `block_configs`; `qkv_bias` gives queries, keys and values a bias, but not outputs."""

    model_type = "nemotron-nas"

    block_configs: list[Any] | None = None
    qkv_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        blocks = self.block_configs or []
        self.block_configs = [_Block({name: _Block(part) for name, part in block.items()}) for block in blocks]
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Refuse blocks that do not fit the other settings; heads need not divide the residual stream.

        Raises:
            ValueError: names the block.
        """
        blocks = self.block_configs or []
        if len(blocks) != self.num_hidden_layers:
            raise ValueError(f"block_configs must have {self.num_hidden_layers} entries, and has {len(blocks)}")
        for number, block in enumerate(blocks):
            if not block.attention.no_op and self.num_attention_heads % block.attention.n_heads_in_group:
                raise ValueError(f"n_heads_in_group of block {number} must divide {self.num_attention_heads}")


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
