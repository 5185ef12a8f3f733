"""DeciLM for mlx-lm: Llama whose blocks have widths of their own.

A folder of such a model brings this file, and its config.json names it as "model_file"; mlx-lm runs it if told to
(`--trust-remote-code`). Needs mlx and mlx-lm, nothing else. `configuration_deci` says what "block_configs" means.
"""

from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache
from mlx_lm.models.rope_utils import initialize_rope

__all__ = ["Model", "ModelArgs"]

_ROTATIONS = ("default", "linear", "llama3")
_ROUNDED = 256


class ModelArgs:
    """The settings of a model, as config.json has them."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.model_type = settings["model_type"]
        self.tied = bool(settings.get("tie_word_embeddings"))
        if len(settings["block_configs"]) != settings["num_hidden_layers"]:
            raise ValueError(f"block_configs must have {settings['num_hidden_layers']} entries")

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "ModelArgs":
        """Make settings of those in config.json."""
        return cls(settings)


class _Attention(nn.Module):  # type: ignore[misc]
    def __init__(self, settings: dict[str, Any], group: int) -> None:
        super().__init__()
        size, self.heads, head = (settings[name] for name in ("hidden_size", "num_attention_heads", "head_dim"))
        if self.heads % group:
            raise ValueError(f"n_heads_in_group must divide {self.heads}")
        self.groups, self.scale = self.heads // group, head**-0.5
        after = bool(settings.get("attention_bias"))
        before = after or bool(settings.get("qkv_bias"))
        self.q_proj = nn.Linear(size, self.heads * head, bias=before)
        self.k_proj = nn.Linear(size, self.groups * head, bias=before)
        self.v_proj = nn.Linear(size, self.groups * head, bias=before)
        self.o_proj = nn.Linear(self.heads * head, size, bias=after)
        rope = settings["rope_parameters"]
        if rope["rope_type"] not in _ROTATIONS:
            raise ValueError(f"rotary positions of type {rope['rope_type']} were not compared with transformers")
        self.rope = initialize_rope(head, rope["rope_theta"], False, rope, settings["max_position_embeddings"])

    def __call__(self, states: mx.array, mask: Any, cache: Any) -> Any:
        apart = ((self.q_proj, self.heads), (self.k_proj, self.groups), (self.v_proj, self.groups))
        queries, keys, values = (
            matrix(states).reshape(*states.shape[:2], heads, -1).transpose(0, 2, 1, 3) for matrix, heads in apart
        )
        start = cache.offset if cache is not None else 0
        queries, keys = self.rope(queries, offset=start), self.rope(keys, offset=start)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        found = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        return self.o_proj(found.transpose(0, 2, 1, 3).reshape(*states.shape[:2], -1))


class _MLP(nn.Module):  # type: ignore[misc]
    def __init__(self, settings: dict[str, Any], ffn: dict[str, Any]) -> None:
        super().__init__()
        size, bias = settings["hidden_size"], bool(settings.get("mlp_bias"))
        units = ffn.get("intermediate_size") or -(-int(2 * ffn["ffn_mult"] * size / 3) // _ROUNDED) * _ROUNDED
        self.gate_proj, self.up_proj = nn.Linear(size, units, bias=bias), nn.Linear(size, units, bias=bias)
        self.down_proj = nn.Linear(units, size, bias=bias)

    def __call__(self, states: mx.array) -> Any:
        return self.down_proj(nn.silu(self.gate_proj(states)) * self.up_proj(states))


class _Block(nn.Module):  # type: ignore[misc]
    def __init__(self, settings: dict[str, Any], block: dict[str, Any]) -> None:
        super().__init__()
        size, small = settings["hidden_size"], settings["rms_norm_eps"]
        self.has_attention, self.has_mlp = not block["attention"]["no_op"], not block["ffn"]["no_op"]
        if self.has_attention:
            self.input_layernorm = nn.RMSNorm(size, eps=small)
            self.self_attn = _Attention(settings, block["attention"]["n_heads_in_group"])
        if self.has_mlp:
            self.post_attention_layernorm = nn.RMSNorm(size, eps=small)
            self.mlp = _MLP(settings, block["ffn"])

    def __call__(self, states: mx.array, mask: Any, cache: Any) -> Any:
        if self.has_attention:
            states = states + self.self_attn(self.input_layernorm(states), mask, cache)
        if self.has_mlp:
            states = states + self.mlp(self.post_attention_layernorm(states))
        return states


class _Body(nn.Module):  # type: ignore[misc]
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(settings["vocab_size"], settings["hidden_size"])
        self.layers = [_Block(settings, block) for block in settings["block_configs"]]
        self.norm = nn.RMSNorm(settings["hidden_size"], eps=settings["rms_norm_eps"])

    def __call__(self, ids: mx.array, cache: Any) -> Any:
        states = self.embed_tokens(ids)
        caches = iter(cache or [None] * len(self.layers))  # one for each block with attention
        mask = create_attention_mask(states, cache[0] if cache else None)
        for layer in self.layers:
            states = layer(states, mask, next(caches) if layer.has_attention else None)
        return self.norm(states)


class Model(nn.Module):  # type: ignore[misc]
    """The model, as mlx-lm calls it."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args, self.model_type, self.model = args, args.model_type, _Body(args.settings)
        if not args.tied:
            self.lm_head = nn.Linear(args.settings["hidden_size"], args.settings["vocab_size"], bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None) -> Any:
        """Logits (B, T, V) of token numbers (B, T)."""
        states = self.model(inputs, cache)
        return self.model.embed_tokens.as_linear(states) if self.args.tied else self.lm_head(states)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The tensors of a file without the head, if the embedding is the head."""
        return {name: values for name, values in weights.items() if not (self.args.tied and name == "lm_head.weight")}

    @property
    def layers(self) -> list[Any]:
        """The blocks, which mlx-lm counts and quantizes."""
        return self.model.layers

    def make_cache(self) -> list[KVCache]:
        """An empty cache for every block with attention."""
        return [KVCache() for layer in self.layers if layer.has_attention]
