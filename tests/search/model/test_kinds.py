from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from compression import Refusal
from search.model.kinds import Kind, kind_of, kind_of_model
from search.model.loading import load_model


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "a pair of an encoder and a decoder"),
        ({"model_type": "bart"}, "a bart, a pair of an encoder and a decoder"),
        ({"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}, "a pair of an encoder"),
        ({"model_type": "bert", "architectures": ["BertForQuestionAnswering"]}, "an encoder of another kind"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "a BertModel, an encoder of another kind"),
        ({"model_type": "clip", "architectures": ["CLIPModel"]}, "a CLIPModel, which is no language model"),
    ],
)
def test_a_model_of_a_kind_that_is_not_compressed_is_refused_by_what_it_is(
    config: dict[str, object], said: str
) -> None:
    with pytest.raises(Refusal, match=said) as refused:
        kind_of("m", config)
    assert "\n" not in str(refused.value)
    assert str(refused.value).endswith("predict masked tokens or classify texts")


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, Kind.CAUSAL),
        ({"model_type": "llama"}, Kind.CAUSAL),
        ({"model_type": "of-my-own"}, Kind.CAUSAL),
        ({"model_type": "bart", "architectures": ["BartForCausalLM"], "is_decoder": True}, Kind.CAUSAL),
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"], "is_decoder": True}, Kind.CAUSAL),
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"]}, Kind.MASKED),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, Kind.MASKED),
        ({"model_type": "bert", "architectures": ["BertForPreTraining"]}, Kind.MASKED),
        ({"model_type": "roberta"}, Kind.MASKED),
        ({"model_type": "roberta", "architectures": ["RobertaForCausalLM"]}, Kind.MASKED),
        ({"model_type": "modernbert", "architectures": ["ModernBertForSequenceClassification"]}, Kind.CLASSIFIER),
        ({"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"]}, Kind.IMAGE_TEXT),
        ({"model_type": "qwen3_5", "architectures": ["Qwen3_5ForCausalLM"]}, Kind.CAUSAL),
        ({"model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"]}, Kind.CAUSAL),
        ({"model_type": "qwen3_5"}, Kind.IMAGE_TEXT),
        ({"model_type": "gemma3"}, Kind.IMAGE_TEXT),
        ({"model_type": "mistral3"}, Kind.IMAGE_TEXT),
    ],
)
def test_a_model_is_of_the_kind_that_it_was_saved_as(config: dict[str, object], kind: Kind) -> None:
    assert kind_of("m", config) is kind


def test_a_model_in_memory_is_of_the_kind_of_its_class() -> None:
    assert kind_of_model(load_model("random:tiny-llama", "cpu").model) is Kind.CAUSAL


def test_a_pair_is_refused_in_one_sentence_before_its_weights_are_read(tmp_path: Path) -> None:
    config = transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=32)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["T5ForConditionalGeneration"]
    with pytest.raises(Refusal, match="is a T5ForConditionalGeneration, a pair of an encoder and a decoder"):
        load_model(str(tmp_path), "cpu")
