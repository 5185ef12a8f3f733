"""Define random models with the shapes of well-known ones, to measure speed and memory without their weights.

Knows configuration fields and how a parameter is drawn; does not know how a model is built. Every parameter has its own
generator, seeded by its name, so that a block drawn alone equals the same block of the whole model.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import transformers

from search.model.pretrained import with_attention

__all__ = ["SHAPES", "TINY", "byte_tokenizer", "random_config", "random_parameter", "tiny_model"]

_STANDARD_DEVIATION = 0.02

SHAPES: dict[str, dict[str, Any]] = {
    "random:llama-3.2-1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": True,
    },
    "random:qwen2.5-1.5b": {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
    },
    "random:llama-2-7b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    },
}
"""Configurations by model name, with the field names of transformers."""


def random_parameter(name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Draw the parameter `name` on the CPU: matrices from N(0, 0.02²), biases 0, other vectors (norms) 1."""
    if len(shape) < 2:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape).normal_(0, _STANDARD_DEVIATION, generator=generator).to(dtype)


TINY: dict[str, dict[str, Any]] = {
    "random:tiny-llama": {"model_type": "llama", "num_key_value_heads": 2},
    "random:tiny-gemma2": {"model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 256},
    "random:tiny-gpt2": {"model_type": "gpt2", "n_inner": 48},
    "random:tiny-qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
    "random:tiny-mixtral": {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 4},
    "random:tiny-qwen3-moe": {
        "model_type": "qwen3_moe",
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
}
TINY_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,  # large enough for non-uniform predictions, so that compression changes them
    "tie_word_embeddings": True,
}


def random_config(name: str) -> Any:
    """The configuration of a random model called `name`."""
    tokens = {"bos_token_id": 256, "eos_token_id": 256}
    if name in SHAPES:
        return transformers.AutoConfig.for_model(**SHAPES[name], **tokens)
    return transformers.AutoConfig.for_model(**TINY[name], **TINY_SHAPE, **tokens, vocab_size=257)


def tiny_model(name: str, dtype: torch.dtype) -> Any:
    """A tiny random model, the same on every call; leaves the global random generator unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return with_attention(
            lambda attention: transformers.AutoModelForCausalLM.from_config(
                random_config(name), attn_implementation=attention, trust_remote_code=False
            ).to(dtype)
        )


def byte_tokenizer() -> Any:
    """A tokenizer with one token per byte, and the token 256 for the end of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {end: len(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end, clean_up_tokenization_spaces=False
    )
