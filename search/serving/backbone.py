"""Makes the model that an engine fills with the weights of a compressed folder.

An engine such as vLLM makes a model from its configuration, without the layers that transformers puts around weights:
no quantizer is asked, and the output head is the engine's own. Here the configuration itself says what is compressed,
and the base model, which is all but the head, puts the compressed modules into itself. Knows transformers' models and
the description in a configuration; does not know an engine.

A copy of this module is exported beside the weights, see `search.export.standalone`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from compression.layers.served import serve_
from compression.layers.skeleton import put_skeleton_
from compression.refusal import Refusal
from search.hf import ChiselConfig, verify_folder

__all__ = [
    "ARCHITECTURE",
    "EngineConfig",
    "description_of",
    "heads_by_layer",
    "ordinary",
    "serve_backbone_",
    "verify_once",
]

ARCHITECTURE = "ChiselForCausalLM"
"""What `architectures` in the config.json of a compressed folder names, whatever its original was: an engine that
knows the original by name would otherwise take the folder for one."""

_ASIDE = "chisel"
_SERVED = ("mpo", "heads", "linear")
_IGNORED = r"\.kept_(rows|columns)$"


class EngineConfig:
    """Mixed into a configuration class of transformers: what is compressed does not count as a quantization.

    An engine refuses a quantization that it does not know, and takes the sizes of attention from the configuration of
    each layer.
    """

    @property
    def quantization_config(self) -> Any:
        """No quantization, so that the attribute is absent; `description_of` gives what was set."""
        raise AttributeError("quantization_config")

    @quantization_config.setter
    def quantization_config(self, value: Any) -> None:
        vars(self)[_ASIDE] = value
        found: Any = self
        if layers := heads_by_layer(found, description_of(found)):
            found.allow_global_per_layer_attribute_access = True
            found.per_layer_config = layers


def description_of(config: Any) -> Mapping[str, Any]:
    """The description of the compressed modules in a configuration, see `compression.layers.skeleton.describe`.

    Raises:
        ValueError: the folder has a newer format.
    """
    stated = vars(config).get(_ASIDE) or getattr(config, "quantization_config", None) or {"modules": {}}
    values = stated if isinstance(stated, Mapping) else stated.to_dict()
    return ChiselConfig(**{name: value for name, value in values.items() if name != "quant_method"}).modules


def ordinary(config: Any, kind: type[Any]) -> Any:
    """The configuration of class `kind` from which transformers itself loads the folder; others stay as they are."""
    if _ASIDE not in vars(config):
        return config
    values = {name: value for name, value in config.to_dict().items() if name not in (_ASIDE, "per_layer_config")}
    values.pop("allow_global_per_layer_attribute_access", None)
    made = kind.from_dict({**values, "quantization_config": vars(config)[_ASIDE]})
    made._name_or_path, made._attn_implementation = config._name_or_path, config._attn_implementation
    return made


def heads_by_layer(config: Any, modules: Mapping[str, Any]) -> dict[int, dict[str, int]]:
    """The numbers of heads in the layers whose attention lost some, at least one key/value group in each.

    Args:
        modules: description of the compressed modules.
    """
    whole, groups = int(config.num_attention_heads), int(getattr(config, "num_key_value_heads", None) or 0)
    size = getattr(config, "head_dim", None) or int(config.hidden_size) // whole
    rows: dict[int, int] = {}
    for name, each in modules.items():
        layer = re.search(r"\.(\d+)\.(?:[^.]*attn|attention)\.", name)
        if layer and each.get("shape"):
            number = int(layer[1])
            rows[number] = min(each["shape"][0], rows.get(number, each["shape"][0]))
    if rows and not groups:
        raise Refusal("heads were removed from an architecture without key/value heads, which engines do not serve")
    left = {number: max(1, count // size) for number, count in sorted(rows.items())}
    return {
        number: {"num_attention_heads": count * (whole // groups), "num_key_value_heads": count}
        for number, count in left.items()
        if count < groups
    }


def serve_backbone_(model: Any, config: Any) -> None:
    """Put the compressed modules of a folder into the base model of an architecture, in place.

    Args:
        model: such as LlamaModel, made from the configuration; its parameters have no values.
        config: as read from the folder. If the folder is on this machine, its files are verified.

    Raises:
        ValueError: the description does not fit the model, a module cannot be served, or the folder was changed.
    """
    verify_once(str(config._name_or_path))
    prefix = f"{model.base_model_prefix}."
    modules = description_of(config)
    if outside := [name for name in modules if not name.startswith(prefix)]:
        raise Refusal(
            f"{outside[0]} is compressed, and an engine has an output head of its own; export without --quantize"
        )
    for name, each in modules.items():
        if each["kind"] not in _SERVED:
            raise Refusal(f"{name} is of the kind {each['kind']}, which transformers reads, but no engine")
    serve_(model, put_skeleton_(model, {name.removeprefix(prefix): each for name, each in modules.items()}))
    empty = [rf"^{re.escape(name)}\.weight$" for name, each in modules.items() if each["kind"] == "heads"]
    model._keys_to_ignore_on_load_unexpected = [_IGNORED, *empty]


@cache
def verify_once(folder: str) -> None:
    """Refuse a folder on this machine whose files were changed after they were written; reads it once a process."""
    if (Path(folder) / "config.json").is_file():
        verify_folder(Path(folder))
