"""Compare what the config of a model folder declares with its weight files, before a model is built from it.

Building a hundred thousand blocks takes hours even without weights. Reads only the config and the headers of the weight
files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from compression.refusal import Refusal
from compression.storage.strict_json import read_object

__all__ = ["refuse_impossible"]

_LARGEST_CONFIG = 1 << 26  # bytes: an exported folder lists every compressed module in it
_COUNT = re.compile(r"^(n|num)_(\w+_)?(layers?|blocks?|heads?)$")  # n_layer, num_hidden_layers, num_attention_heads
_OWN = ("quantization_config", "auto_map")  # not part of the architecture


def refuse_impossible(name: str, folder: Path) -> None:
    """Refuse a config that asks for more blocks than there are tensors, or for less than none.

    Args:
        name: name of the model, for messages.
        folder: a folder with config.json and safetensors.

    Raises:
        Refusal: config.json is not usable, or one of its counts is impossible.
    """
    config = read_object(folder / "config.json", f"the config of model {name!r},", _LARGEST_CONFIG)
    tensors = sum(map(_tensors, folder.glob("*.safetensors")))
    for field, count in _counts(config):
        most = "" if "head" in field else f" and at most {tensors}, the number of stored tensors"
        if count < 0 or (most and count > tensors):
            raise Refusal(f"model {name!r} has a config whose {field} must be at least 0{most}, got {count}")


def _counts(config: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    """The counts of layers and heads in a config and in the configs inside it, such as that of the text model."""
    for field, value in config.items():
        if isinstance(value, int) and not isinstance(value, bool) and _COUNT.match(field):
            yield field, value
        elif isinstance(value, dict) and field not in _OWN:
            yield from _counts(value)


def _tensors(path: Path) -> int:
    """Number of tensors in a file; 0 if it cannot be read, which whoever loads it reports."""
    try:
        with safe_open(path, framework="pt") as file:
            return len(file.keys())
    except (OSError, SafetensorError):
        return 0
