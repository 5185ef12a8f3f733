"""The settings of DeciLM, the architecture of Nemotron-NAS models: Llama whose blocks have widths of their own.

`block_configs` in config.json has an entry for each block. "attention" has "no_op" and "n_heads_in_group", the number
of query heads of a key/value head; all blocks have the same number of query heads. "ffn" has "no_op" and the number of
hidden units: "intermediate_size", or "ffn_mult", which some engines need; 2/3 of the size of the residual stream times
it, rounded up to a multiple of 256, are the hidden units.

A folder of such a model brings this file. It needs transformers without torch, so that engines that have no torch can
read settings and tokenizer.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

__all__ = ["DeciLMConfig", "hidden_units"]

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
