"""Which matrices are sites, which stay dense and why, and which are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from odd_models import (
    STAYING,
    VOCABULARY,
    Model,
    Plain,
    Q,
    empty,
    meta,
    model,
    packed,
    parametrized,
    reasons,
    statistics_of,
    store_of,
    survives,
    tensorized,
)
from tiny_model import Conv1D
from torch import nn

from compression import (
    DENSE,
    Choice,
    MPOLinear,
    Schedule,
    ScheduleApplier,
    Site,
    contract,
    discover_sites,
    lagrangian,
    to_schedule,
)
from envs import Problem
from search.model.loading import load_model


def test_a_transposed_weight_is_tensorized_as_the_matrix_it_means() -> None:
    dense = model()
    x, name = torch.randn(5, 12), "layers.0.up"
    store = store_of(dense)
    dense.get_submodule("layers.0.up").weight.copy_(contract(store.cores(name, Choice("lowrank", 3, "input"))).T)
    expected = dense.get_submodule(name)(x)
    choices = dict(Schedule.dense(tuple(site.name for site in store.sites))) | {name: Choice("lowrank", 3, "input")}
    with ScheduleApplier(dense, store, packed=True) as applier:
        applier.apply_(Schedule(tuple(choices.items())))
        assert isinstance(dense.get_submodule(name), MPOLinear)
        assert torch.allclose(dense.get_submodule(name)(x), expected, atol=1e-5)
    assert isinstance(dense.get_submodule(name), Conv1D)


@pytest.mark.parametrize("name", ["random:tiny-llama", "random:tiny-gpt2", "random:tiny-qwen2"])
def test_the_models_of_transformers_have_no_site_that_stays_dense(name: str) -> None:
    dense = load_model(name, "cpu").model
    assert not reasons(dense)
    survives(dense, vocabulary=257)


@pytest.mark.parametrize("kind", STAYING)
def test_a_site_that_stays_dense_says_why_counts_and_is_not_calibrated(kind: str) -> None:
    make, expected = STAYING[kind]
    dense = make()
    assert reasons(dense) == expected
    matrices = [value for name, value in dense.named_parameters() if name.startswith("layers") and value.ndim > 1]
    assert sum(site.parameters for site in discover_sites(dense)) == sum(value.numel() for value in matrices)
    assert not statistics_of(dense).gradients.keys() & expected.keys()


@pytest.mark.parametrize("kind", STAYING)
def test_a_model_with_a_site_that_stays_dense_is_tensorized_around_it(kind: str) -> None:
    make, expected = STAYING[kind]
    dense = make()
    menu = survives(dense)
    assert menu.dense_parameters == sum(site.parameters for site in discover_sites(dense))
    for options in menu.sites:
        assert (options.choices == (DENSE,)) == (options.site.name in expected)
    name, reason = next(iter(expected.items()))
    store = store_of(dense)
    for choice in (Choice("lowrank", 1, "plain"), Choice("sparse", 1, "two-sided")):
        choices = dict(Schedule.dense(tuple(site.name for site in store.sites))) | {name: choice}
        with pytest.raises(ValueError, match=f"site {name} must stay dense: {reason}"):
            ScheduleApplier(dense, store).apply_(Schedule(tuple(choices.items())))
    steps = Problem.build(menu, 0.7, "site").groups
    assert {menu.sites[index].site.name for group in steps for index in group.sites}.isdisjoint(expected)
    assert sum(len(group.sites) for group in steps) == len(menu.sites) - len(expected)


def test_a_menu_in_which_everything_stays_dense_is_no_problem_to_solve() -> None:
    dense = model(1, 1)
    menu = store_of(dense).menu()
    assert to_schedule(menu, lagrangian(menu, menu.dense_parameters)) == Schedule.dense(tuple(reasons(dense)))
    with pytest.raises(ValueError, match="no site with an option besides dense"):
        Problem.build(menu, 1.0)


def test_a_weight_shared_with_the_embedding_stays_dense() -> None:
    dense = model(VOCABULARY)
    dense.get_submodule(Q).weight = dense.embedding.weight
    assert reasons(dense) == {Q: f"shared by embedding and {Q}"}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (meta, "meta device"),
        (empty, r"empty, of shape \(0, 12\)"),
        (parametrized, "computed; remove its parametrization"),
        (packed, "a Module holds no matrix of its shape"),
        (tensorized, "a MPOLinear holds no matrix of its shape"),
    ],
)
def test_a_matrix_without_values_to_decompose_is_refused_by_name(spoil: Callable[[Model], None], reason: str) -> None:
    dense = model()
    spoil(dense)
    with pytest.raises(ValueError, match=f"site {Q}: .*{reason}"):
        discover_sites(dense)


def test_shapes_alone_will_do_for_a_model_without_values() -> None:
    dense = model()
    sites = discover_sites(dense)
    with pytest.raises(ValueError, match=r"site layers\.0\.q_proj: .*meta device"):
        discover_sites(dense.to("meta"))
    assert discover_sites(dense.to("meta"), shapes_only=True) == sites


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn", "complex64"])
@pytest.mark.parametrize("own_class", [False, True])
def test_quantized_and_complex_weights_are_refused_by_name(dtype: str, own_class: bool) -> None:
    values = torch.zeros(12, 12).to(getattr(torch, dtype))
    dense = model(q_proj=Plain(values) if own_class else None)
    dense.get_submodule(Q).weight = nn.Parameter(values, requires_grad=False)
    with pytest.raises(ValueError, match=f"site {Q}: the weight must be one of float32, .*, got {dtype}"):
        discover_sites(dense)


def test_the_blocks_are_those_that_hold_most_not_a_longer_list_inside_one() -> None:
    dense = model()
    dense.layers[0].add_module("experts", nn.ModuleList(nn.Linear(4, 4) for _ in range(9)))
    assert {site.block for site in discover_sites(dense)} == {0, 1}
    assert Site("layers.0.experts.3", 0, "experts", 4, 4) in discover_sites(dense)
