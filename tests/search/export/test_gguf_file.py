"""GGUF files of models whose widths are alike, differ, or are 0: what is read back computes the same."""

import itertools
import json
from collections import Counter

import gguf
import pytest
import torch
import transformers
from cut_shapes import (
    ALIKE,
    DIFFER,
    FEWER_HEADS,
    NEITHER,
    NO_MLP,
    SHAPES,
    cut_to,
    with_biases_,
)
from engines import BANNED, needs_llama_cpp, run_llama_cpp
from merging_tokenizer import TEMPLATE, merging_tokenizer
from pieces_tokenizer import pieces_tokenizer
from tiny_model import assert_same_logits, tensorized
from tokenizers import Tokenizer
from torch import nn

from compression.layers.kept import kept
from compression.layers.packed import PackedEmbedding, PackedLinear
from compression.layers.quantize import quantize_
from compression.refusal import Refusal
from search.export.gguf_file import GGUF_TYPES, check_gguf, read_values, write_gguf
from search.export.gguf_vocabulary import vocabulary
from search.model.loading import load_model

PROMPT = torch.arange(40).reshape(2, 20)
QWEN, LLAMA = "random:tiny-qwen2", "random:tiny-llama"


@torch.no_grad()
def logits(model):
    return model(PROMPT, attention_mask=torch.ones_like(PROMPT)).logits


def architecture(file):
    return gguf.GGUFReader(file).get_field("general.architecture").contents()


@torch.no_grad()
def refilled(name, shape, loaded, file):
    """Another model of this shape, whose weights are those of the file."""
    other = cut_to(name, shape, loaded.model.lm_head.weight is not loaded.model.model.embed_tokens.weight).model
    for path, parameter in other.named_parameters():
        parameter.fill_(1)
        assert parameter.numel() == 0 or not torch.equal(parameter, loaded.model.get_parameter(path)) or "norm" in path
    for path, values in read_values(other, file).items():
        other.get_parameter(path).copy_(values)
    return other


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [LLAMA, QWEN])
def test_a_file_that_is_read_back_gives_the_same_logits(name, shape, tmp_path):
    loaded, file = cut_to(name, shape, untied=SHAPES.index(shape) % 2 == 0), tmp_path / "model.gguf"
    expected = logits(loaded.model)
    write_gguf(loaded.model, loaded.tokenizer, file, "float32")
    alike = shape in (ALIKE, FEWER_HEADS) if name == LLAMA else shape is ALIKE
    assert architecture(file) == ({LLAMA: "llama", QWEN: "qwen2"}[name] if alike else "deci")
    assert_same_logits(logits(refilled(name, shape, loaded, file)), expected)
    if alike:
        assert_same_logits(logits(load_model(str(file), "cpu").model), expected)


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [LLAMA, QWEN])
def test_llama_cpp_gives_the_same_tokens_and_log_probabilities(name, shape, tmp_path):
    """Every shape comes with tied embeddings in one architecture, and with untied ones in the other."""
    untied = SHAPES.index(shape) % 2 == (name == QWEN)
    loaded, file = cut_to(name, shape, untied), tmp_path / "model.gguf"
    write_gguf(loaded.model, loaded.tokenizer, file, "float32")
    assert_llama_cpp_agrees(loaded, file, 2e-2)


def assert_llama_cpp_agrees(loaded, file, tolerance):
    text = "the weather, 123 times"
    prompt = loaded.tokenizer(text)["input_ids"]
    by_ids, by_text = run_llama_cpp(file, [prompt, text])
    assert by_ids["tokens"] == by_text["tokens"]
    assert by_text["read"] == len(prompt)
    assert len(by_ids["tokens"]) == 8
    ids = torch.tensor([prompt])
    for token, top in zip(by_ids["tokens"], by_ids["top"], strict=True):
        with torch.no_grad():
            scores = loaded.model(ids).logits[0, -1].log_softmax(-1)
        for other, found in top:
            assert abs(float(scores[other]) - found) < tolerance
        scores[BANNED] = -torch.inf
        assert float(scores[token]) > float(scores.max()) - tolerance
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "q8_0", "q4_0"])
def test_llama_cpp_runs_every_type(kind, tmp_path):
    loaded, file = cut_to(LLAMA, NO_MLP), tmp_path / "model.gguf"
    write_gguf(loaded.model, loaded.tokenizer, file, kind)
    for path, values in read_values(loaded.model, file).items():
        loaded.model.get_parameter(path).copy_(values)
    assert_llama_cpp_agrees(loaded, file, 0.2)


@pytest.mark.parametrize("kind", sorted(GGUF_TYPES))
def test_every_type_is_read_back_within_its_rounding(kind, tmp_path):
    loaded, file = cut_to(QWEN, NO_MLP), tmp_path / "model.gguf"
    write_gguf(loaded.model, loaded.tokenizer, file, kind)
    worst = {"float32": 0, "float16": 0.001, "bfloat16": 0.01, "q8_0": 0.01, "q5_1": 0.05, "q5_0": 0.08}.get(kind, 0.12)
    read = read_values(loaded.model, file)
    assert {*read} == {name for name, values in loaded.model.named_parameters()}
    for name, values in read.items():
        before = loaded.model.get_parameter(name)
        assert values.shape == before.shape
        assert (values - before).norm() <= worst * before.norm()
        if before.dim() == 1:
            assert torch.equal(values, before)


def test_scaled_rotary_frequencies_are_written_as_llama_cpp_divides_them(tmp_path):
    loaded, file = cut_to(LLAMA, DIFFER), tmp_path / "model.gguf"
    rope = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    loaded.model.config.rope_parameters = rope
    loaded.model.model.rotary_emb = type(loaded.model.model.rotary_emb)(loaded.model.config)
    write_gguf(loaded.model, loaded.tokenizer, file, "float32")
    [factors] = [each.data for each in gguf.GGUFReader(file).tensors if each.name == "rope_freqs.weight"]
    assert factors[0] == 1
    assert factors[-1] == pytest.approx(8.0, rel=1e-3)
    if needs_llama_cpp.args[0]:
        return
    assert_llama_cpp_agrees(loaded, file, 2e-2)


def test_the_tokenizer_and_its_template_are_in_the_file(tmp_path):
    loaded, file = cut_to(LLAMA, ALIKE), tmp_path / "model.gguf"
    write_gguf(loaded.model, loaded.tokenizer, file, "float16", name="small", license_="mit", source="large")
    reader = gguf.GGUFReader(file)
    said = {name: reader.get_field(f"tokenizer.{name}").contents() for name in ("ggml.pre", "chat_template")}
    assert said == {"ggml.pre": "gpt-2", "chat_template": TEMPLATE}
    assert reader.get_field("general.name").contents() == "small"
    tokenizer = load_model(str(file), "cpu").tokenizer
    for text in ("the weather", "  two spaces, 1234\n\nñandú <|endoftext|>"):
        assert tokenizer(text)["input_ids"] == loaded.tokenizer(text)["input_ids"]


def split(pattern):
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, byte_level]}


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (None, "gpt-2"),
        (DIGITS, "smollm"),
        (split(LLAMA_3), "llama-bpe"),
        (split(LLAMA_3.replace("{1,3}", "")), "qwen2"),
    ],
)
def test_llama_cpp_s_name_of_the_way_to_cut_texts(rule, name):
    assert vocabulary(merging_tokenizer(rule), 257).rule == name


def test_tokens_that_the_tokenizer_lacks_are_marked_as_unused():
    found = vocabulary(merging_tokenizer(), 260)
    assert found.tokens[-3:] == ("[PAD257]", "[PAD258]", "[PAD259]")
    assert (found.types[255], found.types[256], found.types[257]) == (1, 3, 5)
    assert (found.begins, found.ends) == (False, False)


@pytest.mark.parametrize(
    ("rule", "rows", "message"),
    [
        (split(r"\w+"), 257, "no known name for the way .*Split, ByteLevel"),
        (None, 200, "makes token 256, and the model has embeddings for 200"),
    ],
)
def test_tokenizers_that_llama_cpp_cannot_follow_are_refused(rule, rows, message):
    with pytest.raises(Refusal, match=message) as refused:
        vocabulary(merging_tokenizer(rule), rows)
    assert "\n" not in str(refused.value)


def test_a_sentencepiece_vocabulary_has_scores_in_the_order_of_its_merges(tmp_path):
    tokenizer = pieces_tokenizer()
    found = vocabulary(tokenizer, 300)
    assert (found.rule, found.merges, found.spaced, found.begins, found.ends) == ("", (), True, True, False)
    assert found.types[:4] == (2, 3, 3, 6)
    assert (found.types[tokenizer.convert_tokens_to_ids("▁the")], found.types[299]) == (1, 5)
    assert not vocabulary(pieces_tokenizer(prefix=False), 300).spaced


def test_a_sentencepiece_vocabulary_in_another_order_is_refused():
    tokenizer = pieces_tokenizer()
    stated = json.loads(tokenizer.backend_tokenizer.to_str())
    stated["model"]["merges"].reverse()
    with pytest.raises(Refusal, match="in the order of their numbers"):
        vocabulary(transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(stated))), 300)
    stated["normalizer"] = {"type": "Lowercase"}
    with pytest.raises(Refusal, match=r"does not change texts as this tokenizer does \(Lowercase"):
        vocabulary(transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(stated))), 300)


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("prefix", [True, False])
def test_llama_cpp_reads_texts_by_a_sentencepiece_vocabulary(prefix, tmp_path):
    loaded, file = cut_to(LLAMA, DIFFER), tmp_path / "model.gguf"
    tokenizer = pieces_tokenizer(prefix)
    loaded.model.resize_token_embeddings(300, mean_resizing=False)
    write_gguf(loaded.model, tokenizer, file, "float32")
    texts = ["the weather", "ther weath  the", "the (weather) ñ the", "a the"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    by_ids, by_text = run_llama_cpp(file, ids), run_llama_cpp(file, texts)
    for given, one, other in zip(ids, by_ids, by_text, strict=True):
        assert other["read"] == len(given)
        assert other["tokens"] == one["tokens"]


def test_a_tokenizer_without_merges_is_refused():
    with pytest.raises(Refusal, match="needs a tokenizer with merges"):
        vocabulary(load_model(LLAMA, "cpu").tokenizer, 257)


def rounded_to(name, shape, group):
    """A model whose whole matrices have 8, 5 or 4 bits in turn; the embedding, tied or not, has 8 or 5."""
    loaded = cut_to(name, shape, untied=group == 32)
    bits, whole = itertools.cycle((8, 5, 4)), {}
    for path, module in loaded.model.named_modules():
        if isinstance(module, nn.Embedding | nn.Linear) and not kept(module) and module.weight.numel():
            whole[path] = next(bits)
    whole["lm_head"] = 8
    quantize_(loaded.model, whole, lambda name: None, group=group)
    return loaded


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("name", [LLAMA, QWEN])
def test_rounded_matrices_keep_their_integers_and_scales(name, group, tmp_path):
    """With tied embeddings, rows of q and k in another order, and blocks of different widths beside them."""
    for number, shape in enumerate((ALIKE, DIFFER)):
        loaded, file = rounded_to(name, shape, group), tmp_path / f"{number}.gguf"
        write_gguf(loaded.model, loaded.tokenizer, file, "float32")
        kinds = Counter(each.tensor_type.name for each in gguf.GGUFReader(file).tensors)
        assert min(kinds[kind] for kind in ("Q8_0", "Q5_0", "Q4_0")) > 1
        for path, values in read_values(loaded.model, file).items():
            module = loaded.model.get_submodule(path.rpartition(".")[0])
            if isinstance(module, PackedLinear | PackedEmbedding) and path.endswith("weight"):
                assert torch.equal(values, module.weight.float())


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("name", [LLAMA, QWEN])
def test_llama_cpp_computes_what_a_rounded_model_does(name, group, tmp_path):
    loaded, file = rounded_to(name, DIFFER, group), tmp_path / "model.gguf"
    write_gguf(loaded.model, loaded.tokenizer, file, "float32")
    assert_llama_cpp_agrees(loaded, file, 0.1)  # it rounds activations to 8 bits


def test_bits_that_no_type_has_are_refused(tmp_path):
    loaded = cut_to(LLAMA, ALIKE)
    quantize_(loaded.model, {"model.layers.1.self_attn.q_proj": 3}, lambda name: None)
    with pytest.raises(Refusal, match="32 columns in 3 bits, and a GGUF file holds matrices of 8, 5 or 4 bits"):
        write_gguf(loaded.model, loaded.tokenizer, tmp_path / "model.gguf", "float16")


def test_factored_matrices_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(Refusal, match="search with --form plain"):
        write_gguf(tensorized().model, merging_tokenizer(), tmp_path / "model.gguf", "float16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "silu, not with gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "of the kind yarn"),
        ({"layer_types": ["sliding_attention"]}, "sliding window"),
    ],
)
def test_settings_that_llama_cpp_would_ignore_are_refused(change, message):
    model = load_model(LLAMA, "cpu").model
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(Refusal, match=message):
        check_gguf(model, merging_tokenizer())


def test_other_architectures_are_refused_with_the_form_that_works():
    with pytest.raises(Refusal, match=r"not for GPT2LMHeadModel; use --format gguf-ready"):
        check_gguf(load_model("random:tiny-gpt2", "cpu").model, merging_tokenizer())


def test_a_weight_beyond_float16_is_refused(tmp_path):
    loaded = cut_to(LLAMA, ALIKE)
    loaded.model.model.layers[0].mlp.gate_proj.weight[0, 0] = 1e6
    with pytest.raises(Refusal, match="too large for float16; use --dtype bfloat16"):
        write_gguf(loaded.model, loaded.tokenizer, tmp_path / "model.gguf", "float16")


def test_a_file_that_was_written_wrongly_is_noticed(tmp_path, monkeypatch):
    loaded = cut_to(LLAMA, DIFFER)
    plain = gguf.GGUFWriter.write_tensor_data
    seen = []

    def wrong(self, values, *more):
        seen.append(values)
        plain(self, values * 0 if len(seen) == 5 else values, *more)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", wrong)
    with pytest.raises(Refusal, match=r"was written wrongly: model\.layers\.0"):
        write_gguf(loaded.model, loaded.tokenizer, tmp_path / "model.gguf", "float32")


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("shape", [ALIKE, NEITHER])
def test_biases_of_every_matrix_are_computed_by_llama_cpp(shape, tmp_path):
    loaded, file = cut_to(LLAMA, shape), tmp_path / "model.gguf"
    with_biases_(loaded.model)
    write_gguf(loaded.model, loaded.tokenizer, file, "float32")
    assert_llama_cpp_agrees(loaded, file, 2e-2)


def test_mistral_with_a_sliding_window_is_refused():
    config = transformers.MistralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=257
    )
    with pytest.raises(Refusal, match="sliding window"):
        check_gguf(transformers.MistralForCausalLM(config), merging_tokenizer())
