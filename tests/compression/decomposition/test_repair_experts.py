"""A mixture of one expert is an ordinary MLP: its statistics and its repair are those of that MLP."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_bonds import SHRINKAGE, text
from torch import nn

from compression import FactorCache, FactorStore, Statistics, collect, discover_sites
from compression.decomposition.repair import repair_
from compression.layers.experts import take_apart_
from compression.schedule import DENSE, Choice, ExpertForm, Schedule
from compression.sites import dense_weight

_SHAPE = {
    "vocab_size": 128,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "intermediate_size": 40,
    "moe_intermediate_size": 40,
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "norm_topk_prob": True,
    "initializer_range": 0.2,
}
_INSIDE = {"single": ".experts.0.", "shared": ".experts."}


def made(kind: str, form: ExpertForm) -> nn.Module:
    """The same weights as a Qwen3 model and as a mixture of one expert."""
    torch.manual_seed(0)
    dense = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("qwen3", **_SHAPE))
    if kind == "dense":
        return dense.eval().requires_grad_(False)
    mixture = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("qwen3_moe", **_SHAPE))
    mixture = mixture.eval().requires_grad_(False)
    assert take_apart_(mixture, form)
    inside = {name.replace(".mlp.", f".mlp{_INSIDE[form]}"): values for name, values in dense.state_dict().items()}
    mixture.load_state_dict({**mixture.state_dict(), **inside})
    return mixture


def repaired(model: nn.Module, form: ExpertForm) -> tuple[torch.Tensor, torch.Tensor, Statistics]:
    """Logits before and after repair at rank 6, and the statistics with the names of the dense model."""
    sites, batches = discover_sites(model), text(0, 2)
    statistics = collect(model, sites, batches, torch.Generator().manual_seed(1))
    statistics = collect(model, sites, batches, torch.Generator().manual_seed(1), first=statistics)
    weights = {site.name: dense_weight(model.get_submodule(site.name)) for site in sites if not site.dense_because}
    store = FactorStore(sites, weights, lambda: statistics, "key", SHRINKAGE, FactorCache(None))
    choice = Choice("pivoted-lowrank", 6, "two-sided")
    schedule = Schedule(tuple((site.name, DENSE if site.dense_because else choice) for site in sites))
    ids = text(7)[0][0]
    before = model(ids).logits
    repair_(model, sites, schedule, statistics, batches, SHRINKAGE, store.bonds.elimination)
    plain = [
        {name.replace(_INSIDE[form], "."): moment for name, moment in table.items()}
        for table in (statistics.inputs, statistics.gradients)
    ]
    return before, model(ids).logits, Statistics(plain[0], {}, plain[1], statistics.tokens)


@pytest.mark.parametrize("form", ["single", "shared"])
def test_a_mixture_of_one_expert_has_the_statistics_and_the_repair_of_its_mlp(form: ExpertForm) -> None:
    (before, after, expected), (same, found, statistics) = (
        repaired(made(kind, form), form) for kind in ("dense", form)
    )
    torch.testing.assert_close(same, before, rtol=1e-4, atol=1e-5)
    assert statistics.inputs.keys() == expected.inputs.keys()
    for name in expected.inputs:
        for moment, wanted in (
            (statistics.input(name), expected.input(name)),
            (statistics.gradient(name), expected.gradient(name)),
        ):
            torch.testing.assert_close(moment, wanted, rtol=0.01, atol=0.01 * float(wanted.abs().max()))
    change = float((after - before).std())
    if form == "shared":
        torch.testing.assert_close(found, after, rtol=0, atol=0.05 * change)
    else:  # a layer of single experts is decomposed, not corrected
        assert 0.05 * change < float((found - after).std()) < change
