"""Weights, shapes and statistics that a decomposition cannot take as they come: handled, or refused by name."""

import math

import pytest
import torch
from odd_models import (
    VOCABULARY,
    Q,
    model,
    reasons,
    statistics_of,
    store_of,
    survives,
)

from compression import (
    Choice,
    contract,
    discover_sites,
    lagrangian,
    to_schedule,
    uniform_schedule,
)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [Q, "layers.0.up"])
def test_a_weight_that_is_not_finite_is_refused_by_name(name: str, value: float) -> None:
    dense = model()
    dense.get_submodule(name).weight[1, 2] = value
    with pytest.raises(ValueError, match=f"site {name}: the weight has NaN or infinite"):
        discover_sites(dense)


def test_a_zero_weight_costs_nothing_at_any_chi_and_stays_zero() -> None:
    dense = model()
    dense.get_submodule(Q).weight.zero_()
    menu = survives(dense)
    [options] = [options for options in menu.sites if options.site.name == Q]
    assert (options.cost == 0).all()
    assert lagrangian(menu, menu.dense_parameters - 1)[menu.sites.index(options)] == 0
    assert not contract(store_of(dense).cores(Q, options.choices[0])).any()


def test_a_site_whose_output_is_ignored_costs_next_to_nothing() -> None:
    dense = model()
    dense.get_submodule("layers.0.down").weight.zero_()
    statistics = statistics_of(dense)
    assert not statistics.gradient("layers.0.up").any()
    menu = survives(dense)
    cost = {options.site.name: options.cost.max() for options in menu.sites}
    assert cost["layers.0.up"] < 1e-12 * cost["layers.1.up"]
    chosen = to_schedule(menu, lagrangian(menu, menu.dense_parameters // 2))
    assert 1 <= chosen["layers.0.up"].chi < chosen["layers.1.up"].chi


def test_a_model_of_zeros_survives() -> None:
    dense = model()
    for site in discover_sites(dense):
        dense.get_submodule(site.name).weight.zero_()
    menu = survives(dense)
    assert all(choice.chi == 1 for _, choice in to_schedule(menu, lagrangian(menu, menu.dense_parameters)))


def test_a_dead_site_survives_in_float16() -> None:
    dense = model()
    dense.get_submodule("layers.0.down").weight.zero_()
    survives(dense.to(torch.float16))


@pytest.mark.parametrize("scale", [1e-30, 1e-42, 1e15])
def test_weights_of_extreme_size_survive(scale: float) -> None:
    dense = model()
    dense.get_submodule(Q).weight.mul_(scale)
    survives(dense)


def test_a_rank_deficient_weight_is_exact_at_its_rank() -> None:
    dense = model()
    weight = torch.outer(torch.arange(1.0, 13), torch.arange(-5.0, 7)) * 0.01
    dense.get_submodule(Q).weight.copy_(weight)
    survives(dense)
    assert torch.allclose(contract(store_of(dense).cores(Q, Choice("lowrank", 1, "two-sided"))), weight, atol=1e-6)


def test_input_that_spans_one_direction_or_none_survives() -> None:
    for rows in (torch.ones(VOCABULARY, 12), torch.zeros(VOCABULARY, 12)):
        dense = model()
        dense.embedding.weight.copy_(rows)
        survives(dense)


@pytest.mark.parametrize(("width", "wide"), [(13, 17), (15, 21), (12, 13), (3, 5)])
def test_prime_and_odd_dimensions_survive(width: int, wide: int) -> None:
    dense = model(width, wide)
    survives(dense, 0.9)
    assert not reasons(dense)


def test_an_mpo_of_prime_dimensions_is_refused_by_name_and_left_dense_by_a_uniform_schedule() -> None:
    dense = model(13, 17)
    store = store_of(dense)
    with pytest.raises(ValueError, match=f"site {Q}: no χ of mpo2 makes a matrix of 13 × 13 smaller"):
        store.cores(Q, Choice("mpo2", 1, "plain"))
    total = sum(site.parameters for site in store.sites)
    assert uniform_schedule(store.sites, "mpo2", "plain", total)[Q].is_dense
    with pytest.raises(ValueError, match="cannot be met"):
        uniform_schedule(store.sites, "mpo2", "plain", total // 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_survive_and_keep_their_type(dtype: torch.dtype) -> None:
    survives(model().to(dtype))
