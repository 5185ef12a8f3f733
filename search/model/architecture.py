"""Build models from their architecture alone, without stored weights, and read the size of an attention head."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from accelerate import init_empty_weights  # type: ignore[import-untyped]

from compression.refusal import Refusal
from search.model.gguf_shards import joined
from search.model.kinds import auto_class
from search.model.pretrained import Source, quiet_transformers, unusable, with_attention
from search.model.random_models import random_config, random_parameter

__all__ = ["bare_model", "empty_model", "head_size", "shaped_model"]


def head_size(model: Any) -> int | None:
    """Features of one attention head according to the configuration of a model; None if it has no heads."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    named = getattr(config, "head_dim", None)
    if named or not heads:
        return named
    return int(config.hidden_size) // int(heads)


def empty_model(source: Source) -> Any:
    """A model with its buffers in memory, its parameters on the meta device, and its tied parameters tied.

    Raises:
        ValueError: transformers refuses the config, or the header of the GGUF file.
    """
    where = {} if source.gguf is None else {"gguf_file": source.gguf}
    try:
        with quiet_transformers(), joined(source.gguf_files), init_empty_weights(include_buffers=False):
            if source.folder is None:
                config = random_config(source.name)
            else:
                config = transformers.AutoConfig.from_pretrained(
                    source.folder, local_files_only=True, trust_remote_code=source.trusted, **where
                )
            model = with_attention(
                lambda attention: auto_class(source.kind).from_config(
                    config, attn_implementation=attention, trust_remote_code=source.trusted
                )
            )
    except Exception as error:  # for the reason given in `read_pretrained`
        if source.gguf is not None:
            raise unusable(source, error) from error
        raise Refusal(f"model {source.name!r} has a config that cannot be used: {error}") from error
    model.tie_weights()
    return model.eval().requires_grad_(False)


def bare_model(model: Any) -> Any:
    """The dense architecture of a model, which may be compressed, on the meta device with its ties."""
    config = type(model.config).from_dict({**model.config.to_dict(), "quantization_config": None})
    with torch.device("meta"):
        bare = type(model)(config)
    bare.tie_weights()
    return bare


def shaped_model(name: str, dtype: torch.dtype) -> Any:
    """A random model with the shape of a public one; each parameter is drawn separately."""
    model = empty_model(Source(name, name, "none"))
    for path, parameter in list(model.named_parameters()):
        owner, _, leaf = path.rpartition(".")
        values = random_parameter(path, parameter.shape, dtype)
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    return model
