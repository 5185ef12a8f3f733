"""A tiny random model as a folder, with a tokenizer that llama.cpp can follow."""

from __future__ import annotations

from pathlib import Path

import torch
from merging_tokenizer import merging_tokenizer
from transformers import PreTrainedModel

from search.model.loading import load_model

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
"""Sizes of a tiny model whose rows are whole groups of 64."""


def wide_model(name: str = "random:tiny-llama", **settings: object) -> PreTrainedModel:
    """A random model like `name` with other settings."""
    model = load_model(name, "cpu").model
    torch.manual_seed(0)
    values = {**model.config.to_dict(), **WIDE, "initializer_range": 0.15, **settings}
    made: PreTrainedModel = type(model)(type(model.config).from_dict(values))
    return made.eval().requires_grad_(False)


def model_folder(folder: Path, name: str = "random:tiny-llama", blocks: int = 3, wide: bool = False) -> Path:
    """Write the first blocks of the model `name`, or of a wider one like it, to a folder, and return the folder."""
    model = wide_model(name) if wide else load_model(name, "cpu").model
    model.model.layers = model.model.layers[:blocks]
    model.config.num_hidden_layers, model.config.layer_types = len(model.model.layers), None
    model.save_pretrained(folder)
    merging_tokenizer().save_pretrained(folder)
    return folder
