"""A tiny random model as a folder, with a tokenizer that llama.cpp can follow."""

from __future__ import annotations

from pathlib import Path

from merging_tokenizer import merging_tokenizer

from search.model.loading import load_model


def model_folder(folder: Path, name: str = "random:tiny-llama", blocks: int = 3) -> Path:
    """Write the first blocks of the model `name` to a folder, and return the folder."""
    model = load_model(name, "cpu").model
    model.model.layers = model.model.layers[:blocks]
    model.config.num_hidden_layers, model.config.layer_types = len(model.model.layers), None
    model.save_pretrained(folder)
    merging_tokenizer().save_pretrained(folder)
    return folder
