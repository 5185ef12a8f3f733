"""Tiny random image-text models as folders, with vision towers that are larger than their language parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from search.model.random_models import byte_tokenizer

_TEXT = {
    "vocab_size": 257,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "depth": 4,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
_ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
SHAPES: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": {**_TEXT, "sliding_window": 64}, "vision_config": _VISION, "mm_tokens_per_image": 4},
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "mistral"},
        "vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 32},
    },
    "qwen3_vl": {"text_config": {**_TEXT, "rope_parameters": _ROTARY}, "vision_config": _QWEN},
}
"""Configurations by model type, with the field names of transformers."""


def image_text_folder(folder: Path, kind: str) -> Path:
    """Write a model of one of `SHAPES` as it would be published, and return the folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **SHAPES[kind])
        model = transformers.AutoModelForImageTextToText.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for values in model.parameters():
            if values.ndim > 1:
                values.normal_(0, 0.15, generator=generator)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_resize": True}))
    return folder
