"""A cache of latents: the same logits and texts as a plain one, from less memory; refused where it cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from compression import discover_sites
from compression.layers.mpo_linear import MPOLinear
from compression.numerics.cores import decompose, truncate
from compression.numerics.gauge import stored
from compression.numerics.legs import resolve
from compression.sites import dense_weight
from search.model.latent_cache import cache_bytes, latent_cache
from search.model.loading import load_model

NAMES = ("random:tiny-llama", "random:tiny-qwen2")


def compressed(name: str, families: Sequence[str] = ("k", "v"), kept: float = 0.6) -> Any:
    model = load_model(name, "cpu").model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for site in discover_sites(model):
            old = model.get_submodule(site.name)
            if isinstance(old, torch.nn.Linear) and old.bias is not None:
                old.bias.data.normal_()
            if site.family in families:
                legs = resolve("pivoted-lowrank", site.out_features, site.in_features)
                cores = decompose(dense_weight(old).double(), legs)[0]
                chi = legs.largest_chi(int(kept * site.parameters))
                cut = [core.float() for core in truncate(cores, chi)]
                model.set_submodule(site.name, MPOLinear(stored(cut, True), old.bias))
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("families", [("k", "v"), ("k",), ("v",), ()])
def test_passes_with_it_give_the_logits_of_a_plain_cache_from_fewer_numbers(name: str, families: Sequence[str]) -> None:
    model = compressed(name, families)
    ids = torch.arange(24).reshape(2, 12) * 7 % 200
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    plain, found = DynamicCache(config=model.config), []
    with latent_cache(model) as cache, torch.no_grad():
        for each in (plain, cache):
            logits = []
            for part in (slice(0, 7), slice(7, 8), slice(8, 12)):
                out = model(
                    input_ids=ids[:, part],
                    attention_mask=mask[:, : part.stop],
                    position_ids=positions[:, part],
                    past_key_values=each,
                    use_cache=True,
                )
                logits.append(out.logits)
            found.append(torch.cat(logits, 1))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[0][1, 3:], found[1][1, 3:], rtol=1e-4, atol=1e-5)
        layer = model.base_model.layers[0].self_attn
        wanted = sum(p.chi if isinstance(p, MPOLinear) else p.out_features for p in (layer.k_proj, layer.v_proj))
        dense = layer.k_proj.out_features + layer.v_proj.out_features
        assert cache_bytes(cache) / cache_bytes(plain) == pytest.approx(wanted / dense)
        assert (wanted < dense) == bool(families)


def test_beams_and_other_passes_meanwhile_do_not_disturb_it() -> None:
    model = compressed("random:tiny-llama")
    ids = torch.arange(3, 9)[None]
    words: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "max_new_tokens": 8}
    plain = model.generate(ids, num_beams=3, do_sample=False, **words)
    with latent_cache(model) as cache:
        model(input_ids=ids, use_cache=False)
        assert torch.equal(model.generate(ids, num_beams=3, do_sample=False, past_key_values=cache, **words), plain)
        model(input_ids=ids)


def test_a_cache_that_is_cut_goes_on_from_there() -> None:
    model = compressed("random:tiny-llama")
    ids = torch.arange(3, 15)[None]
    with latent_cache(model) as cache, torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        cache.crop(-4)
        found = model(input_ids=ids[:, 8:], past_key_values=cache).logits
        torch.testing.assert_close(found, model(input_ids=ids).logits[:, 8:], rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    model = compressed("random:tiny-llama")
    before = deepcopy(model.state_dict())
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    with latent_cache(model):
        pass
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_kind_of_attention_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="needs attention with k_proj"),
        latent_cache(load_model("random:tiny-gpt2", "cpu").model),
    ):
        pass
    model = compressed("random:tiny-llama")
    attention = model.base_model.layers[0].self_attn
    attention.k_norm = torch.nn.LayerNorm(attention.head_dim)  # says that it norms its keys, and does not
    with pytest.raises(ValueError, match="its logits differ"), latent_cache(model):
        pass
