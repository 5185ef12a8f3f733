"""Fused matrices are split into the parts that the architecture makes of their rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from compression import discover_sites, split_fused_
from compression.layers.fused import FusedLinear
from compression.layers.merge import merge_
from compression.layers.skeleton import describe, put_skeleton_
from compression.refusal import Refusal

COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
HIDDEN = {**COMMON, "intermediate_size": 48}
GROUPED = {**HIDDEN, "num_key_value_heads": 2}
HEADS = {head: range(24 * head, 24 * head + 24) for head in range(4)}
INTERLEAVED = {
    part: [row for rows in HEADS.values() for row in rows[8 * at : 8 * at + 8]] for at, part in enumerate("qkv")
}
THIRDS = {part: [*range(32 * at, 32 * at + 32)] for at, part in enumerate("qkv")}
GATED = {"gate": [*range(48)], "up": [*range(48, 96)]}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, dict[str, list[int]]]]] = {
    "phi3": (
        "phi3",
        GROUPED,
        {"qkv_proj": {"q": [*range(32)], "k": [*range(32, 48)], "v": [*range(48, 64)]}, "gate_up_proj": GATED},
    ),
    "glm": ("glm", {**GROUPED, "head_dim": 8}, {"gate_up_proj": GATED}),
    "gpt2": ("gpt2", {**COMMON, "n_inner": 48}, {"c_attn": THIRDS}),
    "gpt_neox": ("gpt_neox", HIDDEN, {"query_key_value": INTERLEAVED}),
    "bloom": ("bloom", {**COMMON, "n_layer": 1}, {"query_key_value": INTERLEAVED}),
    "falcon, one key": (
        "falcon",
        {**COMMON, "multi_query": True},
        {"query_key_value": {"q": [*range(32)], "k": [*range(32, 40)], "v": [*range(40, 48)]}},
    ),
    "falcon, grouped": (
        "falcon",
        {**COMMON, "new_decoder_architecture": True, "num_kv_heads": 2},
        {
            "query_key_value": {
                "q": [*range(16), *range(32, 48)],
                "k": [*range(16, 24), *range(48, 56)],
                "v": [*range(24, 32), *range(56, 64)],
            }
        },
    ),
    "modernbert": ("modernbert", HIDDEN, {"Wqkv": THIRDS, "Wi": GATED}),
}


def made(name: str) -> Any:
    kind, fields, _ = MODELS[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **fields)
    auto = transformers.AutoModelForMaskedLM if kind == "modernbert" else transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager" if kind == "bloom" else "sdpa")
    with torch.no_grad():
        for values in model.parameters():
            values.normal_(0, 0.2)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.arange(1, 41).reshape(2, 20)).logits
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_part_has_the_rows_that_the_architecture_takes_for_it(name: str) -> None:
    model = made(name)
    before = logits(model)
    split = split_fused_(model, discover_sites(model))
    found = {path.rpartition(".")[2]: model.get_submodule(path).rows() for path in split}
    assert found == MODELS[name][2]
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["phi3", "gpt_neox", "gpt2"])
def test_the_parts_are_sites_of_the_families_of_a_model_that_does_not_fuse(name: str) -> None:
    model = made(name)
    split_fused_(model, discover_sites(model))
    families = {site.family for site in discover_sites(model)}
    assert {"q", "k", "v"} <= families
    assert ({"gate", "up", "down", "o"} <= families) == (name == "phi3")


@pytest.mark.parametrize("name", ["phi3", "gpt_neox", "gpt2"])
def test_the_parts_merge_to_the_fused_matrix_bit_for_bit(name: str) -> None:
    model, dense = made(name), made(name)
    split_fused_(model, discover_sites(model))
    merge_(model, made(name))
    assert model.state_dict().keys() == dense.state_dict().keys()
    assert all(torch.equal(values, dense.state_dict()[path]) for path, values in model.state_dict().items())


def test_a_description_puts_the_same_parts_into_another_model() -> None:
    model, other = made("gpt_neox"), made("gpt_neox")
    split_fused_(model, discover_sites(model))
    described = describe(model)
    for each in described.values():
        each["parts"] = dict(reversed(each["parts"].items()))  # as a file may have them
    with torch.device("meta"):
        put_skeleton_(other, described)
    other.load_state_dict(model.state_dict(), assign=True)
    torch.testing.assert_close(logits(other), logits(model))


@pytest.mark.parametrize(
    "parts", [{"q": [[0, 95]]}, {"q": [[0, 96]], "k": [[0, 1]]}, {"q.r": [[0, 96]]}, {"q": [[0, 1 << 40]]}, {"q": 3}]
)
def test_a_description_of_other_rows_is_refused(parts: object) -> None:
    model = made("gpt_neox")
    [name] = split_fused_(model, discover_sites(model))
    with pytest.raises(Refusal, match="does not fit a matrix"):
        put_skeleton_(made("gpt_neox"), {name: {"kind": "fused", "parts": parts}})


def test_a_model_without_fused_matrices_stays_as_it_is() -> None:
    config = transformers.AutoConfig.for_model("llama", **GROUPED)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    assert split_fused_(model, discover_sites(model)) == []
    assert not any(isinstance(module, FusedLinear) for module in model.modules())
