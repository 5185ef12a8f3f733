"""Logits of models of 16 bits are those of their numbers, not rounded once more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from search.evaluation.logits import Dense, Reading, read
from search.model.loading import load_model

IDS = torch.arange(40).view(2, 20)
SOURCE = torch.arange(40)


def reduced(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    return load_model(name, "cpu", dtype).model


def looked_at(model: nn.Module) -> Reading:
    return read(model, {"input_ids": IDS}, SOURCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_16_bits_are_computed_in_float32(dtype: torch.dtype) -> None:
    model = reduced("random:tiny-llama", dtype)
    with torch.no_grad():
        own, readings = model(input_ids=IDS).logits.flatten(0, 1), [looked_at(model) for _ in range(2)]
    for reading in readings:  # the first pass finds out that the head is plain
        exact = reading.hidden.double() @ model.get_output_embeddings().weight.double().T
        assert reading.logits.dtype == torch.float32
        assert torch.allclose(reading.logits.double(), exact, rtol=1e-5, atol=1e-5)
        assert float((reading.logits.to(dtype) == own).float().mean()) > 0.98


@pytest.mark.parametrize("factor", [0.05, 30])
def test_capped_logits_are_those_of_the_model(factor: float) -> None:
    """Also if those of the first pass are far below the cap: its arithmetic rounds them."""
    model = reduced("random:tiny-gemma2")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(factor)
        own = model(input_ids=IDS).logits.flatten(0, 1)
        for _ in range(2):
            assert torch.equal(looked_at(model).logits, own.float())


def test_logits_that_are_not_finite_do_not_decide_how_later_ones_are_computed() -> None:
    model = reduced("random:tiny-llama")
    norm = model.model.norm.weight
    with torch.no_grad():
        kept = norm.clone()
        norm.fill_(torch.nan)
        assert not torch.isfinite(looked_at(model).logits).any()
        norm.copy_(kept)
        reading = looked_at(model)
    assert not torch.equal(reading.logits, reading.logits.bfloat16().float())


def test_the_dense_model_is_remembered_by_vectors_as_long_as_hidden_states_and_gradients_agree() -> None:
    model, other = reduced("random:tiny-llama"), reduced("random:tiny-llama")
    other.get_output_embeddings().weight = model.get_output_embeddings().weight
    with torch.no_grad():
        dense = looked_at(model)
        reference = Dense(dense)
        other.model.norm.weight.mul_(1.3)
    assert not hasattr(reference, "_probability")
    other.model.norm.weight.requires_grad_(True)
    reading = looked_at(other)
    chances = dense.logits.softmax(-1)
    kl = reference.negentropy - (reference.mean(reading) - reading.logits.logsumexp(-1))
    expected = (chances * (dense.logits.log_softmax(-1) - reading.logits.log_softmax(-1))).sum(-1)
    assert torch.allclose(kl, expected, atol=1e-5)
    (found,) = torch.autograd.grad(kl.sum(), other.model.norm.weight, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected.sum(), other.model.norm.weight)
    assert torch.allclose(found.float(), wanted.float(), rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))
