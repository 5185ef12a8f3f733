"""Healing trains the routers of a mixture, and gives them back."""

from __future__ import annotations

import torch

from compression import MPOLinear, decompose, resolve
from compression.layers.experts import take_apart_
from compression.sites import dense_weight, discover_sites, router_weights
from compression.training.trainable import put_parameters, trainable_
from search.model.loading import load_model


def test_routers_are_trained_beside_the_factors_and_put_back() -> None:
    model = load_model("random:tiny-mixtral", "cpu").model
    routers = router_weights(model)
    assert routers == {f"model.layers.{block}.mlp.gate.weight" for block in range(3)}
    take_apart_(model)
    assert router_weights(model) == routers
    assert {f"{site.name}.weight" for site in discover_sites(model) if site.dense_because} == routers
    name = "model.layers.0.mlp.experts.1.up_proj"
    weight = dense_weight(model.get_submodule(name))
    model.set_submodule(name, MPOLinear(decompose(weight, resolve("lowrank", *weight.shape))[0]))
    before = {each: model.get_parameter(each) for each in routers}
    fresh = trainable_(model)
    assert routers <= fresh.keys()
    assert {each for each, values in fresh.items() if values.ndim > 1} - routers == {f"{name}.core_0", f"{name}.core_1"}
    ids = torch.arange(60).reshape(2, 30)
    model(ids).logits.square().mean().backward()
    assert all(float(fresh[each].grad.abs().max()) > 0 for each in routers)
    put_parameters(model, before)
    assert all(model.get_parameter(each) is values for each, values in before.items())
