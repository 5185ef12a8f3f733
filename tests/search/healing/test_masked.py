"""Healing of masked language models: what is learned, and from what."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from encoders import encoder_folder
from fake_data import fake_data
from tiny_model import tensorized

from compression.refusal import Refusal
from compression.training.trainable import put_parameters, trainable_
from search.healing.teacher import Teacher
from search.healing.text import heal_text
from search.model.loading import LoadedModel, load_model

__all__ = ["fake_data"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(encoder_folder(tmp_path_factory.mktemp("models") / "bert", "bert")), "cpu")


@pytest.mark.usefixtures("fake_data")
def test_the_targets_are_what_the_dense_model_predicts_at_the_mask_tokens(loaded: LoadedModel) -> None:
    text = heal_text(loaded, "text", 64, 0, 256)
    assert torch.equal(text.wanted, text.tokens == loaded.mask_token)
    assert set(text.tokens[:, 0].tolist()) == set(loaded.beginning)
    assert set(text.tokens[:, -1].tolist()) == set(loaded.ending)
    assert 0.1 < text.wanted.float().mean() < 0.2
    targets, _ = Teacher(loaded.model, text, 8, hidden=False, keep=False, seed=0).targets([0, 2])
    ids = text.tokens[[0, 2]].long()
    with torch.no_grad():
        logs = loaded.model(input_ids=ids).logits.log_softmax(-1)[ids == loaded.mask_token]
    assert len(targets) == len(logs)
    assert torch.allclose(targets.logs, logs.gather(1, targets.tokens), atol=2e-3)  # stored in 16 bits
    assert torch.allclose(targets.logs.sort(descending=True).values, logs.topk(8).values, atol=2e-3)


@pytest.mark.usefixtures("fake_data")
def test_an_encoder_samples_no_text(loaded: LoadedModel) -> None:
    with pytest.raises(Refusal, match="sampled text needs a model that continues text"):
        heal_text(loaded, "sampled", 64, 0, 256)


def test_a_tied_bias_stays_tied_while_it_is_trained_and_after_that(tmp_path: Path) -> None:
    model = tensorized(str(encoder_folder(tmp_path / "bert", "bert"))).model
    head = model.cls.predictions
    before = head.bias
    assert head.decoder.bias is before
    fresh = trainable_(model)
    assert head.bias is head.decoder.bias is fresh["cls.predictions.bias"]
    put_parameters(model, {"cls.predictions.bias": before})
    assert head.bias is head.decoder.bias is before
