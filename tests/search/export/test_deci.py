"""Blocks of different widths as a DeciLM folder: transformers computes the same from it."""

import json

import pytest
import torch
from cut_shapes import ALIKE, DIFFER, NO_ATTENTION, ONE_HEAD_LESS, SHAPES, cut_to, with_biases_
from tiny_model import assert_same_logits, tensorized
from transformers import AutoModelForCausalLM

from compression.refusal import Refusal
from compression.sites import model_parameters
from search.export.deci import deci_model
from search.export.folder import export_plain
from search.model.configuration_deci import hidden_units
from search.model.loading import load_model

PROMPT = torch.arange(40).reshape(2, 20)
LLAMA, QWEN = "random:tiny-llama", "random:tiny-qwen2"


@torch.no_grad()
def logits(model):
    return model(PROMPT, attention_mask=torch.ones_like(PROMPT)).logits


def by_the_code_beside_it(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def blocks(folder):
    return json.loads((folder / "config.json").read_text())["block_configs"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [LLAMA, QWEN])
def test_every_shape_gives_the_same_logits_without_a_file(name, shape):
    model = cut_to(name, shape, untied=SHAPES.index(shape) % 2 == 0).model
    before = logits(model)
    assert_same_logits(logits(deci_model(model)), before)
    assert_same_logits(logits(model), before)


@pytest.mark.parametrize(("name", "shape"), [(LLAMA, ONE_HEAD_LESS), (QWEN, NO_ATTENTION)])
def test_transformers_reads_the_folder_by_the_code_beside_it(name, shape, tmp_path):
    loaded = cut_to(name, shape)
    export_plain(loaded.model, loaded.tokenizer, tmp_path / "plain")
    model = by_the_code_beside_it(tmp_path / "plain")
    assert type(model).__name__ == "DeciLMForCausalLM"
    assert_same_logits(logits(model), logits(loaded.model))
    options = dict(attention_mask=torch.ones_like(PROMPT), max_new_tokens=8, do_sample=False, pad_token_id=256)
    assert torch.equal(model.generate(PROMPT, **options), loaded.model.generate(PROMPT, **options))
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", trust_remote_code=True, dtype=torch.bfloat16)
    assert logits(half).dtype == torch.bfloat16


def test_the_folder_is_refused_without_trust(tmp_path):
    loaded = cut_to(LLAMA, DIFFER)
    export_plain(loaded.model, loaded.tokenizer, tmp_path / "plain")
    with pytest.raises(Refusal, match="trust-remote-code"):
        load_model(str(tmp_path / "plain"), "cpu")
    trusted = load_model(str(tmp_path / "plain"), "cpu", trusted=True)
    assert_same_logits(logits(trusted.model), logits(loaded.model))


def test_blocks_that_are_alike_need_no_code(tmp_path):
    loaded = cut_to(LLAMA, ALIKE)
    export_plain(loaded.model, loaded.tokenizer, tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))


def test_only_heads_are_filled_up(tmp_path):
    model = cut_to(LLAMA, DIFFER).model
    assert model_parameters(deci_model(model)) == model_parameters(model)
    loaded = cut_to(LLAMA, ONE_HEAD_LESS)
    export_plain(loaded.model, loaded.tokenizer, tmp_path / "plain")
    assert [block["ffn"]["intermediate_size"] for block in blocks(tmp_path / "plain")] == [24, 48, 40]
    assert [block["attention"]["n_heads_in_group"] for block in blocks(tmp_path / "plain")] == [2, 4, 2]


def test_a_block_without_heads_has_no_attention(tmp_path):
    loaded = cut_to(LLAMA, NO_ATTENTION)
    export_plain(loaded.model, loaded.tokenizer, tmp_path / "plain")
    assert [block["attention"]["no_op"] for block in blocks(tmp_path / "plain")] == [False, True, False]


def test_biases_go_along():
    model = cut_to(LLAMA, ONE_HEAD_LESS).model
    with_biases_(model)
    assert_same_logits(logits(deci_model(model)), logits(model))
    model.model.layers[1].mlp.up_proj.bias = None
    with pytest.raises(Refusal, match="a bias in all or none of down_proj, gate_proj, up_proj"):
        deci_model(model)


@pytest.mark.parametrize(("size", "units"), [(576, 256), (576, 1536), (2048, 5632), (4096, 11008), (5120, 256)])
def test_multiples_of_256_are_stated_as_every_engine_reads_them(size, units):
    stated = 3 * units / (2 * size)
    exact = int(2 * stated * size / 3)  # vLLM and others: then up to the next multiple of 256
    assert exact + (-exact % 256) == units
    assert hidden_units({"ffn_mult": stated}, size) == units


def test_other_architectures_and_factors_are_refused_with_the_form_that_works(tmp_path):
    with pytest.raises(Refusal, match=r"GPT2LMHeadModel is none; use --format gguf for llama\.cpp, or --format hf"):
        deci_model(load_model("random:tiny-gpt2", "cpu").model)
    with pytest.raises(Refusal, match="is factored"):
        export_plain(tensorized().model, None, tmp_path / "plain")
