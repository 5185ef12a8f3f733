"""The embedding and the output head: what the head reads, and how both are rounded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from compression.layers.quantize import packed
from compression.refusal import Refusal
from compression.sites import discover_sites, put_modules
from search.config import Config
from search.export.folder import footprint
from search.model.budget import Budget
from search.model.ends import ends, head_moment, reads_head_input, rounded_ends, rounding_saves
from search.model.loading import load_model

TIED, APART = "tied", "apart"


def made(name: str) -> Any:
    """A tiny model whose embedding and head share a matrix, or not."""
    model = load_model("random:tiny-llama", "cpu").model
    if name == APART:
        model.config.tie_word_embeddings = False
        weight = model.lm_head.weight
        model.lm_head.weight = nn.Parameter(weight.detach().flip(0).contiguous(), requires_grad=False)
    return model


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    ids = torch.randint(0, 256, (6, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[4:, 12:] = 0
    return [(ids[:2], mask[:2]), (ids[2:], mask[2:])]


def hidden_states(model: Any) -> torch.Tensor:
    """What the head reads, from the outputs of transformers."""
    with torch.no_grad():
        states = [
            model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1][mask.bool()]
            for ids, mask in batches()
        ]
    return torch.cat(states).double()


@pytest.mark.parametrize("name", [TIED, APART])
def test_the_moment_is_that_of_the_last_hidden_states(name: str) -> None:
    model = made(name)
    states = hidden_states(model)
    torch.testing.assert_close(head_moment(model, batches()), states.T @ states / len(states), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [TIED, APART])
def test_the_head_is_rounded_for_what_it_reads_and_an_embedding_of_its_own_is_not(name: str) -> None:
    model = made(name)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    before = {each: parameter.clone() for each, parameter in model.named_parameters()}
    states = hidden_states(model)
    moment = states.T @ states / len(states)
    [of_head] = [each for each in ends(model) if model.get_submodule(each) is head]
    [of_embedding] = [each for each in ends(model) if model.get_submodule(each) is embedding]
    assert reads_head_input(model, of_head)
    assert reads_head_input(model, of_embedding) == (name == TIED)
    errors, tables = [], []
    for metric in (None, moment):
        rounded = rounded_ends(model, 4, metric)
        assert set(rounded) == {of_head, of_embedding}
        errors.append(((rounded[of_head].weight - head.weight).double() @ states.T).square().sum())
        tables.append(rounded[of_embedding].weight)
    assert errors[1] < 0.9 * errors[0]
    assert torch.equal(*tables) == (name == APART)
    assert all(torch.equal(parameter, before[each]) for each, parameter in model.named_parameters())


@pytest.mark.parametrize("name", [TIED, APART])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_bytes_that_rounding_saves_are_those_of_the_stored_tensors(name: str, bits: int) -> None:
    model = made(name).half()
    rounded = copy.deepcopy(model)
    put_modules(rounded, rounded_ends(rounded, bits, None))
    assert rounding_saves(model, bits) == footprint(model).stored - footprint(rounded).stored


def test_an_embedding_that_scales_what_it_looks_up_stays_as_it_is_and_so_does_a_head_of_its_matrix() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32, "vocab_size": 257}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    for shared in (True, False):
        model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads, tie_word_embeddings=shared)).eval()
        assert ends(model) == ([] if shared else ["lm_head"])
        assert (rounding_saves(model, 8) == 0) == shared
        ids = batches()[0][0]
        with torch.no_grad():
            before = model(ids).logits
            put_modules(model, rounded_ends(model, 8, None))
            assert (model(ids).logits - before).norm() < 0.01 * before.norm()
        with pytest.raises(Refusal, match="Gemma3TextScaledWordEmbedding cannot be quantized"):
            packed(model.get_input_embeddings(), 8, 64, None)
    config = Config.of({"form": "small", "embedding_bits": 4})
    tied = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads))
    with pytest.raises(Refusal, match="embedding_bits must be 16 for default, whose embedding does more than look up"):
        Budget.of(config, tied, discover_sites(tied))
