"""Turns a model with fewer hidden units or heads into an ordinary smaller model, without code of ours.

An architecture of transformers has one number of hidden units and one of heads for all blocks. Where these are enough,
the smaller model has the architecture of the original; whether its settings describe it is not guessed from names: a
model is made from them, and every shape is compared. Blocks that differ need the architecture of
`search.export.deci`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compression.bonds import KEPT
from compression.layers.experts import Expert, experts_apart
from compression.layers.kept import kept
from compression.layers.skeleton import describe
from compression.refusal import Refusal
from compression.sites import dense_weight
from search.export.deci import check_deci, deci_model
from search.model.architecture import bare_model

__all__ = ["plain_model"]

_HIDDEN = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff")
_OF_EXPERTS = ("moe_intermediate_size", *_HIDDEN)
_PLAIN = ("linear", "experts")
_OR = "or export with --format hf"
_ELSE = "use --format gguf for llama.cpp, or --format hf for transformers"


@torch.no_grad()
def plain_model(model: Any, whole: bool = False) -> Any:
    """Return a smaller model that computes the same, and shares the weights of this one.

    Args:
        model: a model that lost hidden units or heads; it does not change. If it lost the same number in every block,
            the result has its architecture, otherwise it is DeciLM.
        whole: whether a model that lost nothing is accepted too.

    Raises:
        Refusal: a matrix is factored, nothing was removed though something must be, or neither architecture has
            settings for such a model; the message says what stands in the way and which form can be exported.
    """
    if factored := [name for name, each in describe(model).items() if each["kind"] not in _PLAIN]:
        raise Refusal(
            f"{factored[0]} is factored or stacked, and the plain format has neither; search with --form plain and "
            f"without --experts shared, {_OR}"
        )
    widths = _widths(model)
    if not (widths or whole):
        raise Refusal("no hidden unit and no head was removed from this model; export it with --format dense")
    for leaf, each in widths.items():
        if len(set(each)) > 1 or not each[0]:
            check_deci(model, f"different widths ({leaf} has {min(each):,} to {max(each):,} inputs)")
            return deci_model(model)
    changes = _changes(model, widths)
    settings = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    config = type(model.config).from_dict(_with(settings, _place(model.config), changes))
    try:
        with torch.device("meta"):
            small = type(model)(config)
    except (ValueError, ZeroDivisionError) as error:
        raise Refusal(f"{type(model).__name__} takes no settings such as {changes}; {_ELSE}") from error
    tensors = _tensors(model)
    shapes = {name: tuple(values.shape) for name, values in small.state_dict().items()}
    for name, shape in shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise Refusal(f"{type(model).__name__} has no settings for this model: {name} is {found}; {_ELSE}")
    small.load_state_dict({name: tensors[name] for name in shapes}, assign=True)
    small.tie_weights()
    small.generation_config = model.generation_config
    small.config._name_or_path = model.config._name_or_path
    return small.eval().requires_grad_(False)


def _place(config: Any) -> str:
    """The name of the settings of the language part inside those of an image-text model; otherwise empty."""
    language = config.get_text_config()
    return next((name for name, value in vars(config).items() if value is language), "")


def _with(settings: Mapping[str, Any], place: str, changes: Mapping[str, int]) -> dict[str, Any]:
    return {**settings, place: {**settings[place], **changes}} if place else {**settings, **changes}


def _widths(model: Any) -> dict[str, list[int]]:
    """The number of inputs that is left of every matrix that lost some, by `_leaf` and block."""
    modules = dict(model.named_modules())
    readers = sorted({_leaf(name) for name, module in modules.items() if "kept_columns" in kept(module)})
    return {
        leaf: [dense_weight(module).shape[1] for name, module in modules.items() if _leaf(name) == leaf]
        for leaf in readers
    }


def _changes(model: Any, widths: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The settings of the smaller model that differ from those of the original; of an image-text model, those of its
    language part."""
    changes: dict[str, int] = {}
    config = model.config.get_text_config()
    modules = dict(model.named_modules())
    for leaf, (width, *_) in widths.items():
        parent = next(name for name in modules if _leaf(name) == leaf).rpartition(".")[0]
        size = getattr(modules[parent], "head_dim", None)
        if isinstance(size, int):
            rows = [dense_weight(each).shape[0] for each in modules[parent].children() if "kept_rows" in kept(each)]
            changes |= {"num_attention_heads": width // size, "num_key_value_heads": min(rows) // size}
            changes["head_dim"] = size
        elif isinstance(modules[parent], Expert):
            field = next((name for name in _OF_EXPERTS if hasattr(config, name)), _OF_EXPERTS[0])
            changes[field] = width
        else:
            changes |= {field: width for field in _HIDDEN if hasattr(config, field)}
    return changes


def _leaf(name: str) -> str:
    """The last two parts of a module's name, such as "mlp.down_proj", which are the same in every block and expert."""
    return ".".join([part for part in name.split(".") if not part.isdecimal()][-2:])


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    """The stored tensors by name, in the form in which the architecture stores them, without `KEPT`."""
    bare = bare_model(model)
    found = {name: values for name, values in model.state_dict().items() if name.rpartition(".")[2] not in KEPT}
    apart = experts_apart(model)
    inside = tuple(f"{path}." for path in apart)
    found = {name: values for name, values in found.items() if not name.startswith(inside)}
    for path, experts in apart.items():
        found |= {f"{path}.{name}": values for name, values in experts.fused().named_parameters()}
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, nn.Linear) and not isinstance(bare.get_submodule(name), nn.Linear):
            found[f"{name}.weight"] = module.weight.T.contiguous()
    return found
