"""Turns a Llama-like model whose blocks have different widths into one of the architecture DeciLM.

DeciLM has one number of query heads for all blocks, and a number of key/value heads that divides it for each. A block
with fewer heads than the others is therefore filled up with heads of zeros; one without any has no attention at all.
Engines take sizes from the first block, whose attention stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from compression.refusal import Refusal
from search.model.configuration_deci import DeciLMConfig
from search.model.modeling_deci import DeciLMForCausalLM

__all__ = ["check_deci", "deci_model"]

_LLAMA_LIKE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
_ROUNDED = 256  # of "ffn_mult", which engines without "intermediate_size" read
_MATRICES = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("down_proj", "gate_proj", "up_proj")),
)
"""Matrices by the part of a block that holds them, in groups that have a bias all or none."""
_DROPPED = (
    *("quantization_config", "model_type", "architectures", "auto_map"),
    *("layer_types", "sliding_window", "max_window_layers", "use_sliding_window"),
)
"""Settings of the original that DeciLM has not."""
_ELSE = "use --format gguf for llama.cpp, or --format hf"


@dataclass(frozen=True)
class _Shape:
    """What is left of a block: hidden units and key/value groups, 0 for a part that is left out."""

    units: int
    groups: int


@torch.no_grad()
def deci_model(model: Any) -> Any:
    """Return a `DeciLMForCausalLM` that computes the same.

    Args:
        model: a Llama, Mistral or Qwen2 model with plain matrices; it does not change, and shares its weights where
            nothing has to be filled up.

    Raises:
        Refusal: the architecture is none of these, or has settings that DeciLM has not.
    """
    check_deci(model)
    config, layers = model.config, model.model.layers
    head = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    ratio = config.num_attention_heads // config.num_key_value_heads
    biased = {names[0]: _biased(model, part, names) for part, names in _MATRICES}
    shapes = []
    for number, layer in enumerate(layers):
        groups = layer.self_attn.k_proj.out_features // head
        if not groups and (number == 0 or biased["o_proj"]):
            groups = 1
        units = layer.mlp.down_proj.in_features
        shapes.append(_Shape(units or int(biased["down_proj"]), groups))
    most = max(shape.groups for shape in shapes)
    stored = [_groups(shape.groups, most) for shape in shapes]
    rounded = all(shape.units % _ROUNDED == 0 for shape in shapes)
    blocks = [
        {
            "attention": {"no_op": not shape.groups, "n_heads_in_group": most * ratio // count if count else None},
            "ffn": {"no_op": not shape.units} | _units(shape.units, config.hidden_size, rounded),
        }
        for shape, count in zip(shapes, stored, strict=True)
    ]
    settings = {name: value for name, value in config.to_dict().items() if name not in _DROPPED}
    settings |= {
        "num_attention_heads": most * ratio,
        "num_key_value_heads": most,
        "head_dim": head,
        "attention_bias": biased["o_proj"],
        "qkv_bias": biased["q_proj"],
        "mlp_bias": biased["down_proj"],
        "block_configs": blocks,
    }
    with torch.device("meta"):
        made = DeciLMForCausalLM(DeciLMConfig(**settings))
    state = model.state_dict()
    filled = {}
    for name, values in made.state_dict().items():
        part = name.split(".")[-2]
        parts = stored[int(name.split(".")[2])] if part in ("q_proj", "o_proj") else 1
        size = ratio * head if part in ("q_proj", "o_proj") else None
        filled[name] = _filled(state[name], values.shape, parts, size)
    made.load_state_dict(filled, assign=True)
    made.model.rotary_emb = model.model.rotary_emb
    made.tie_weights()
    made.generation_config = model.generation_config
    made.config._name_or_path = config._name_or_path
    return made.eval().requires_grad_(False)


def check_deci(model: Any, what: str = "blocks of different widths") -> None:
    """Refuse a model whose blocks cannot have different widths in DeciLM; looks at no weights.

    Args:
        what: what needs DeciLM, for the message.

    Raises:
        Refusal: says what stands in the way, and which form can be exported.
    """
    name, config = type(model).__name__, model.config
    if name not in _LLAMA_LIKE:
        raise Refusal(f"{what} need a Llama-like model, and {name} is none; {_ELSE}")
    if config.hidden_act != "silu":
        raise Refusal(f"{what} need the activation silu, not {config.hidden_act}; {_ELSE}")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or (name == "MistralForCausalLM" and config.sliding_window is not None):
        raise Refusal(f"{what} cannot have attention in a sliding window; {_ELSE}")


def _biased(model: Any, part: str, names: tuple[str, ...]) -> bool:
    """Whether these matrices have a bias, which is the same for all of them in all blocks.

    Raises:
        Refusal: it is not.
    """
    around = [getattr(layer, part) for layer in model.model.layers]
    found = {each.get_submodule(name).bias is not None for each in around for name in names}
    if len(found) > 1:
        raise Refusal(f"DeciLM needs a bias in all or none of {', '.join(names)}; {_ELSE}")
    return found.pop()


def _groups(groups: int, most: int) -> int:
    """The least number of key/value heads of which each can have a whole number of the query heads."""
    return next(count for count in range(groups, most + 1) if count and most % count == 0) if groups else 0


def _units(units: int, size: int, rounded: bool) -> dict[str, Any]:
    return {"ffn_mult": 3 * units / (2 * size)} if rounded else {"intermediate_size": units}


def _filled(values: torch.Tensor, shape: torch.Size, parts: int, size: int | None) -> torch.Tensor:
    """A tensor with zeros for the heads and units that it lacks.

    Args:
        values: what is left, of the same number of axes.
        shape: the shape with all heads and units.
        parts, size: the axis that grows has so many parts, and in the tensor each of them begins with so many entries;
            zeros follow them, and fill parts that are missing. None means that the tensor has one part.
    """
    if values.shape == shape:
        return values
    axis = next(axis for axis, (old, new) in enumerate(zip(values.shape, shape, strict=True)) if old < new)
    there = values.shape[axis] if size is None else size
    before, after = values.shape[:axis], values.shape[axis + 1 :]
    wide = values.new_zeros(*before, parts, shape[axis] // parts, *after)
    if there:
        count = values.shape[axis] // there
        wide.narrow(axis, 0, count).narrow(axis + 1, 0, there).copy_(values.reshape(*before, count, there, *after))
    return wide.reshape(shape)
