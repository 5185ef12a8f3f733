"""Encoders: masked texts, their scores beside plain forward passes, statistics and exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from encoders import LABELS, SHAPES, encoder_folder
from tiny_model import assert_same_logits, tensorized

from compression.calibration.statistics import MomentAccumulator, collect
from compression.refusal import Refusal
from compression.sites import discover_sites
from search.data.item_files import load_jsonl
from search.data.items import Item
from search.evaluation.workload import Workload
from search.experiment.experiment import workload_sequences
from search.export.folder import export_dense_, export_model
from search.model.kinds import Kind
from search.model.loading import LoadedModel, load_for_use, load_model

TEXTS = [
    "The first text of several.",
    "Another one, which is quite a bit longer than the first text and stands alone.",
    "x",
]
CASES = [(kind, classifies) for kind in SHAPES for classifies in (False, True)]


@pytest.fixture(scope="module", params=CASES, ids=str)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, classifies = request.param
    return encoder_folder(tmp_path_factory.mktemp("models") / kind, kind, classifies)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(str(folder), "cpu")


def sequences(loaded: LoadedModel) -> list[Any]:
    items = [Item(text, LABELS, number) for number, text in enumerate(TEXTS)]
    text = [("prose", loaded.encode_whole(each)) for each in TEXTS]
    return workload_sequences(loaded, items if loaded.kind is Kind.CLASSIFIER else [], "mmlu", "answer", text)


@torch.no_grad()
def alone(model: Any, tokens: tuple[int, ...]) -> torch.Tensor:
    """Logits of one text by itself, (length, vocabulary) or (classes,)."""
    found: torch.Tensor = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    return found


def test_a_masked_text_is_the_same_every_time_and_keeps_its_special_tokens(tmp_path: Path) -> None:
    loaded = load_model(str(encoder_folder(tmp_path, "bert")), "cpu")
    for text in TEXTS:
        whole = loaded.encode_whole(text)
        tokens, answers = loaded.masked(whole)
        assert loaded.masked(whole) == (tokens, answers)
        assert [at for at, token in enumerate(tokens) if token == loaded.mask_token] == [at for at, _ in answers]
        assert len(answers) == max(1, round(0.15 * len(text)))
        restored = list(tokens)
        for at, token in answers:
            restored[at] = token
        assert restored == loaded.tokenizer(text)["input_ids"]


def test_scores_equal_those_of_every_text_in_a_pass_of_its_own(loaded: LoadedModel) -> None:
    dense, other = loaded.model, tensorized(str(loaded.tokenizer.name_or_path)).model
    found = sequences(loaded)
    workload = Workload(found, dense, batch_tokens=200)
    workload.reference(dense)
    quality = workload.measure(other)
    kl, right, chosen = [], [], []
    for sequence in found:
        logs, changed = alone(dense, sequence.tokens), alone(other, sequence.tokens)
        if loaded.kind is Kind.CLASSIFIER:
            kl.append((logs.exp() * (logs - changed)).sum())
            right.append(changed[sequence.answer].exp())
            chosen.append(changed.argmax() == sequence.answer)
        else:
            places = torch.tensor([at for at, _ in sequence.masked])
            kl += list((logs.exp() * (logs - changed)).sum(-1)[places])
            right += [changed[at, token] for at, token in sequence.masked]
    assert quality.tokens == len(kl)
    assert quality.kl == pytest.approx(float(torch.stack(kl).mean()), rel=1e-3)
    if loaded.kind is Kind.CLASSIFIER:
        assert quality.expected_accuracy == pytest.approx(float(torch.stack(right).mean()), rel=1e-3)
        assert quality.accuracy == pytest.approx(float(torch.stack(chosen).float().mean()))
    else:
        assert quality.items == 0
        assert quality.perplexity == pytest.approx(float((-torch.stack(right).mean()).exp()), rel=1e-3)


def test_statistics_are_per_prediction(loaded: LoadedModel) -> None:
    """G is the sum over tokens of g gᵀ, divided by the number of predictions, for g of the sampled predictions."""
    model, row = loaded.model, sequences(loaded)[1]
    sites, ids = discover_sites(model), torch.tensor([row.tokens])
    found = collect(
        *(model, sites, [(ids, torch.ones_like(ids).bool())], torch.Generator().manual_seed(3)),
        mask_token=loaded.mask_token,
    )
    gradients: list[torch.Tensor] = []
    with MomentAccumulator(model, []):  # makes the embeddings require gradients
        hook = model.get_submodule(sites[-1].name).register_forward_hook(
            lambda module, args, output: (output.register_hook(gradients.append), None)[1]
        )
        logits = model(input_ids=ids).logits
        hook.remove()
    chances = logits.detach().softmax(-1).cumsum(-1)
    drawn = torch.rand(logits.shape[:-1], generator=torch.Generator().manual_seed(3)) * chances[..., -1]
    tokens = torch.searchsorted(chances, drawn[..., None])
    likelihood = logits.log_softmax(-1).gather(-1, tokens)[..., 0]
    predicted = torch.ones(1).bool() if loaded.mask_token is None else ids == loaded.mask_token
    likelihood[predicted].sum().backward()
    rows = gradients[0].flatten(0, -2)
    torch.testing.assert_close(found.gradient(sites[-1].name), rows.T @ rows / predicted.sum(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("form", ["hf", "dense"])
def test_an_export_is_of_the_original_class_and_computes_the_same(
    loaded: LoadedModel, form: str, tmp_path: Path
) -> None:
    small = tensorized(str(loaded.tokenizer.name_or_path))
    ids = torch.tensor([loaded.tokenizer("a text")["input_ids"]])
    with torch.no_grad():
        expected = small.model(input_ids=ids).logits
    {"hf": export_model, "dense": export_dense_}[form](small.model, small.tokenizer, tmp_path / "out")
    if form == "hf":
        named = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
        assert loaded.kind.value in named
        read = load_for_use(str(tmp_path / "out"), "cpu").model
    else:
        read = getattr(transformers, loaded.kind.value).from_pretrained(tmp_path / "out")
    assert type(read) is type(loaded.model)
    with torch.no_grad():
        assert (read(input_ids=ids).logits - expected).abs().max() < 1e-3 * expected.abs().max()


def test_an_encoder_does_not_continue_text(loaded: LoadedModel) -> None:
    with pytest.raises(Refusal, match=r"generate needs a model that continues text, and .* is a \w+, an encoder"):
        loaded.must_continue_text("generate")


def test_the_next_sentence_head_beside_the_weights_is_left_out(tmp_path: Path) -> None:
    encoder_folder(tmp_path / "whole", "bert")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "whole")
    model = transformers.BertForPreTraining(config)
    model.save_pretrained(tmp_path / "pre")
    load_model(str(tmp_path / "whole"), "cpu").tokenizer.save_pretrained(tmp_path / "pre")
    found = load_model(str(tmp_path / "pre"), "cpu")
    assert type(found.model) is transformers.BertForMaskedLM
    assert_same_logits(
        alone(found.model, (259, 5, 260)),
        model.eval()(torch.tensor([[259, 5, 260]])).prediction_logits[0].log_softmax(-1),
    )


def test_a_tokenizer_without_a_mask_token_is_refused(tmp_path: Path) -> None:
    loaded = load_model(str(encoder_folder(tmp_path, "bert")), "cpu")
    loaded.tokenizer.mask_token = None
    with pytest.raises(Refusal, match="its tokenizer has no mask token"):
        _ = loaded.mask_token


def test_labelled_texts_are_items(tmp_path: Path) -> None:
    path = tmp_path / "reviews.jsonl"
    path.write_text('{"text": "a", "label": "good"}\n{"text": "b", "label": "bad"}\n')
    assert load_jsonl(path) == (Item("a", ("bad", "good"), 1), Item("b", ("bad", "good"), 0))
    path.write_text('{"text": "a", "label": 10}\n{"text": "b", "label": 2}\n')
    assert [item.choices[item.answer] for item in load_jsonl(path)] == ["10", "2"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}\n', "its labels are the choices"),
        ('{"text": " ", "label": "x"}\n', "line 1: 'text' must be text"),
        ('{"text": "a", "label": true}\n', "line 1: 'label' must be a name or a whole number"),
        ('{"text": "a", "label": 1}\n{"question": "a", "choices": ["b", "c"], "answer": 0}\n', "line 2: all lines"),
    ],
)
def test_labelled_texts_that_cannot_be_used_are_refused(lines: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "reviews.jsonl"
    path.write_text(lines)
    with pytest.raises(Refusal, match=said):
        load_jsonl(path)


def test_a_label_that_is_no_class_of_the_model_is_refused(tmp_path: Path) -> None:
    loaded = load_model(str(encoder_folder(tmp_path, "bert", classifies=True)), "cpu")
    with pytest.raises(Refusal, match=r"a label must be one of bad, good, mixed or a number below 3, .* got 'awful'"):
        workload_sequences(loaded, [Item("a", ("awful", "good"), 0)], "x.jsonl", "answer", [])
