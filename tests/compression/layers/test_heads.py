"""Heads as sites: the same function, found as sites of their families, and compressed one by one."""

from __future__ import annotations

import pytest
import torch

from compression import discover_sites, split_heads_
from search.model.architecture import head_size
from search.model.loading import load_model

MODELS = {"random:tiny-llama": 4 + 2 + 2 + 4, "random:tiny-qwen2": 4 + 2 + 2 + 4, "random:tiny-gpt2": 12 + 4}


@pytest.mark.parametrize(("name", "parts"), MODELS.items())
def test_a_model_in_heads_computes_the_same_and_has_more_sites(name: str, parts: int) -> None:
    loaded = load_model(name, "cpu")
    ids = torch.tensor([loaded.encode("What is a head? " * 4)])
    before, sites = loaded.model(ids).logits, discover_sites(loaded.model)
    size = head_size(loaded.model)
    assert size is not None
    cut = split_heads_(loaded.model, sites, size)
    after = discover_sites(loaded.model)
    torch.testing.assert_close(loaded.model(ids).logits, before, rtol=1e-4, atol=1e-5)
    blocks = 1 + max(site.block for site in sites)
    assert len(after) == len(sites) - len(cut) + blocks * parts
    assert sum(site.parameters for site in after) == sum(site.parameters for site in sites)
    assert {site.family for site in after} == {site.family for site in sites}


def test_a_matrix_outside_attention_or_without_whole_heads_is_left_alone() -> None:
    loaded = load_model("random:tiny-llama", "cpu")
    sites = discover_sites(loaded.model)
    assert split_heads_(loaded.model, [site for site in sites if "mlp" in site.name], 8) == []
    assert split_heads_(loaded.model, sites, 5) == []
    assert discover_sites(loaded.model) == sites
