"""What a model is made of: an empty model of its shape, the decoder without its head, the size of a head."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from accelerate import init_empty_weights  # type: ignore[import-untyped]

from compression.refusal import Refusal
from search.model.pretrained import Source, quiet_transformers
from search.model.random_models import random_config, random_parameter

__all__ = ["bare_model", "empty_model", "head_size", "shaped_model"]


def head_size(model: Any) -> int | None:
    """Features of one attention head by the configuration of a model; None where it has no heads."""
    config = model.config
    heads = getattr(config, "num_attention_heads", None)
    named = getattr(config, "head_dim", None)
    if named or not heads:
        return named
    return int(config.hidden_size) // int(heads)


def empty_model(source: Source) -> Any:
    """The architecture of a model with its buffers, but parameters without memory (on the meta device), ties kept.

    Raises:
        ValueError: a GGUF file, whose weights cannot be read one by one, or a config that transformers refuses.
    """
    if source.gguf is not None:
        raise Refusal(f"model {source.name!r} is a GGUF file, which cannot be read block by block; use safetensors")
    try:
        with quiet_transformers(), init_empty_weights(include_buffers=False):
            if source.folder is None:
                config = random_config(source.name)
            else:
                config = transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except Exception as error:  # as in `_read`
        raise Refusal(f"model {source.name!r} has a config that cannot be used: {error}") from error
    model.tie_weights()
    return model.eval().requires_grad_(False)


def bare_model(model: Any) -> Any:
    """The dense architecture of a model, all on the meta device, ties kept; the model may be compressed."""
    config = type(model.config).from_dict({**model.config.to_dict(), "quantization_config": None})
    with torch.device("meta"):
        bare = type(model)(config)
    bare.tie_weights()
    return bare


def shaped_model(name: str, dtype: torch.dtype) -> Any:
    """A random model in a public shape, its parameters drawn one by one."""
    model = empty_model(Source(name, name, "none"))
    for path, parameter in list(model.named_parameters()):
        owner, _, leaf = path.rpartition(".")
        values = random_parameter(path, parameter.shape, dtype)
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    return model
