"""Fused experts taken apart compute the same and are fused again bit for bit, in every layout of the library."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from compression import discover_sites
from compression.bonds import discover_bonds
from compression.layers.experts import Experts, experts_apart, take_apart_
from compression.schedule import ExpertForm

_SHARED = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 12,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 5,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
LAYOUTS = {
    "qwen3_moe": {},
    "mixtral": {},
    "gpt_oss": {},  # transposed, interleaved, with biases and a gate of its own
    "llama4_text": {
        "intermediate_size_mlp": 12,
        "interleave_moe_layer_step": 1,
        "num_experts_per_tok": 1,
    },  # not routed
    "nemotron_h": {
        "layers_block_type": ["moe", "attention"],
        "n_routed_experts": 5,
        "moe_latent_size": None,
    },  # no gate
}


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    settings = {**_SHARED, **LAYOUTS[kind]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), attn_implementation="eager")
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("form", ["single", "shared"])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_experts_taken_apart_compute_the_same_and_are_fused_again_bit_for_bit(kind: str, form: ExpertForm) -> None:
    model = made(kind)
    ids = torch.arange(40).reshape(2, 20)
    expected, before = model(ids).logits, {name: value.clone() for name, value in model.state_dict().items()}
    names = take_apart_(model, form)
    assert names == list(experts_apart(model)) != []
    matrices, parts = 2 if kind == "nemotron_h" else 3, 1 if form == "shared" and kind != "llama4_text" else 5
    for experts in experts_apart(model).values():
        assert experts.num_experts == 5
        assert sum(isinstance(module, nn.Linear) for module in experts.modules()) == parts * matrices
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    for name, experts in experts_apart(model).items():
        model.set_submodule(name, experts.fused())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_the_hidden_units_of_stacked_experts_are_one_bond_and_those_of_single_experts_one_each(kind: str) -> None:
    groups = {}
    for form in ("single", "shared"):
        model = made(kind)
        take_apart_(model, form)
        found = [bond for bond in discover_bonds(model, discover_sites(model)) if bond.kind == "hidden"]
        assert all(bond.least == 0 for bond in found)
        groups[form] = [bond.groups for bond in found]
    assert groups == {"single": [12] * 10, "shared": [60] * 2}


class Odd(nn.Module):
    """Experts in the usual layout, whose hidden values are not what the names say."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 4))
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        up, gate = torch.einsum("bi,eoi->beo", x, self.gate_up_proj).chunk(2, -1)
        every = torch.einsum("bei,eoi->beo", self.act_fn(gate) * up, self.down_proj)
        chosen: torch.Tensor = (every.gather(1, index[..., None].expand(-1, -1, 6)) * weights[..., None]).sum(1)
        return chosen


def test_a_layer_that_computes_something_else_than_its_layout_says_stays_fused() -> None:
    model = nn.Sequential(Odd())
    assert take_apart_(model) == []
    assert isinstance(model[0], Odd)


@pytest.mark.parametrize("change", ["bias", "shape", "buffer"])
def test_a_layer_with_tensors_of_an_unknown_layout_is_refused(change: str) -> None:
    odd = Odd()
    if change == "bias":
        odd.other = nn.Parameter(torch.zeros(3))
    elif change == "shape":
        odd.down_proj = nn.Parameter(torch.randn(3, 6, 5))
    else:
        odd.register_buffer("scale", torch.ones(3))
    with pytest.raises(ValueError, match="a Odd is no fused layer of experts of a known layout"):
        Experts(odd)


def test_numbers_that_no_expert_has_are_skipped_and_rows_without_experts_give_zero() -> None:
    model = made("qwen3_moe")
    [experts, _] = [apart for _ in [take_apart_(model)] for apart in experts_apart(model).values()]
    rows = torch.randn(3, 16)
    index, weights = torch.tensor([[0, 5], [5, 5], [4, 1]]), torch.rand(3, 2)
    found = experts(rows, index, weights)
    assert torch.equal(found[1], torch.zeros(16))
    torch.testing.assert_close(found[0], weights[0, 0] * experts[0](rows[:1])[0])
    torch.testing.assert_close(
        found[2], weights[2, 0] * experts[4](rows[2:])[0] + weights[2, 1] * experts[1](rows[2:])[0]
    )
