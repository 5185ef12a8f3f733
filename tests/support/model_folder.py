"""A tiny random model as a folder, with a tokenizer that llama.cpp can follow."""

from __future__ import annotations

from pathlib import Path

from merging_tokenizer import merging_tokenizer

from search.model.loading import load_model


def model_folder(folder: Path, name: str = "random:tiny-llama") -> Path:
    """Write the model `name` to a folder, and return the folder."""
    load_model(name, "cpu").model.save_pretrained(folder)
    merging_tokenizer().save_pretrained(folder)
    return folder
