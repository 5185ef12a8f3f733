"""Refuses a model folder that needs code of its own, before transformers sees it.

A config may name Python files in `auto_map`, and transformers would import them, or ask on standard input whether it
may. Chisel imports them only where the user passes `--trust-remote-code`. Otherwise every loader is called with
`trust_remote_code=False`, and a folder that cannot be used without its code is refused by name. Knows the files of a
model folder; loads no weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from compression.refusal import Refusal
from compression.storage.strict_json import read_object
from search.model.kinds import Kind

__all__ = ["MODULE", "is_compressed", "is_model_folder", "read_config", "references", "refuse_own_code"]

MODULE = "modeling_chisel"
"""Name, without .py, of the file that an export writes for loaders without Chisel. An export imports the copy that it
has just written, to check it; we never import that of a folder that we are given."""

_OURS = {"AutoConfig", "AutoModel", *Kind}  # what an export names in auto_map
_LARGEST = 1 << 26  # bytes of a config; the largest that we know, with its added tokens, has 3 MB


def read_config(folder: Path, name: str) -> Mapping[str, object]:
    """The object in a JSON file of a model folder; empty if there is no such file.

    Raises:
        Refusal: the file is larger than 64 MiB, or `read_object` rejects it.
    """
    path = folder / name
    return read_object(path, "the file", _LARGEST) if path.exists() else {}


def is_compressed(folder: Path) -> bool:
    """Whether a folder holds a compressed model that `search.py export` wrote in the "hf" format."""
    try:
        return _method(read_config(folder, "config.json")) == "chisel"
    except Refusal:
        return False  # whoever loads the folder says what is wrong with it


def is_model_folder(folder: Path) -> bool:
    """Whether the config.json of a folder is that of a model; a run folder has a file of this name too."""
    try:
        return "model_type" in read_config(folder, "config.json")
    except Refusal:
        return False  # whoever loads the folder says what is wrong with it


def refuse_own_code(name: str, folder: Path, gguf: bool = False) -> None:
    """Refuse a model folder that brings Python code, or that cannot be used without code.

    The config and the tokenizer's config may name classes in `auto_map`. That is refused if the file of a class is in
    the folder, if the class is in another repository, or if transformers itself has no class to use instead. The file
    that `search.py export` writes is the exception: our own reader takes its place.

    Args:
        name: name of the model for the message.
        folder: folder with the model's files.
        gguf: the model is a GGUF file in that folder; it has a config of its own, and a config.json there is not read.

    Raises:
        Refusal: as above; or a config is unreadable, or names an architecture that transformers does not know.
    """
    config: Mapping[str, object] = {} if gguf else read_config(folder, "config.json")
    tokenizer = read_config(folder, "tokenizer_config.json")
    ours = _method(config) == "chisel"
    kind = config.get("model_type")
    known = not config or (isinstance(kind, str) and kind in CONFIG_MAPPING)
    wanted = tokenizer.get("tokenizer_class")
    class_known = not isinstance(wanted, str) or tokenizer_class_from_name(wanted) is not None
    for file, document, has_class in (
        ("config.json", config, known),
        ("tokenizer_config.json", tokenizer, class_known),
    ):
        for key, reference in references(document.get("auto_map")):
            if ours and file == "config.json" and key in _OURS and reference.partition(".")[0] == MODULE:
                continue
            code = folder / f"{reference.partition('.')[0]}.py"
            brings = os.path.exists(code)  # also for an impossible name, where Path.exists raises
            if brings or "--" in reference or not has_class:
                raise Refusal(
                    f"model {name!r} wants to run code of its own: auto_map in its {file} names {reference!r}; give a "
                    "model whose classes are in transformers, or remove auto_map if those classes fit, or, if you "
                    "trust the code, add --trust-remote-code"
                )
    if not known:
        raise Refusal(
            f"model {name!r} needs code that is not in transformers: model_type in its config.json is {kind!r}, which "
            "transformers does not know; give a model of an architecture that it knows, or, if the folder brings code "
            "that you trust, add --trust-remote-code"
        )


def _method(config: Mapping[str, object]) -> object:
    quantization = config.get("quantization_config")
    return quantization.get("quant_method") if isinstance(quantization, dict) else None


def references(auto_map: object, key: str = "") -> Iterator[tuple[str, str]]:
    """The class references in an `auto_map` with their keys; some tokenizers have a list of them."""
    if isinstance(auto_map, str):
        yield key, auto_map
    elif isinstance(auto_map, dict):
        for name, value in auto_map.items():
            yield from references(value, name)
    elif isinstance(auto_map, list):
        for value in auto_map:
            yield from references(value, key)
