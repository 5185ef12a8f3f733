"""The knapsack against enumeration of all allocations."""

import itertools

import numpy as np
import pytest

from compression import DENSE, Choice, Menu, Site, SiteMenu, dense_menu, lagrangian
from compression.allocation.knapsack import knapsack
from compression.allocation.menu import Option, envelope, nested_options


def random_menu(seed, sites=4, options=5, shape="any"):
    """Costs in any order, never rising, or convex; parameters small, so that budgets bind and ties occur."""
    rng = np.random.default_rng(seed)
    menus = []
    for number in range(sites):
        count = int(rng.integers(1, options + 1))
        parameters = np.cumsum(rng.integers(1, 12, count))
        cost = rng.integers(1, 30, count) / 8 if seed % 2 else rng.exponential(1.0, count)
        if shape != "any":
            cost = np.sort(cost)[::-1]
        if shape == "convex":
            cost = np.cumsum(np.cumsum(cost[::-1]))[::-1].copy()
        cost[-1] = 0.0
        menus.append(
            SiteMenu(
                Site(f"s{number}", number, "q", 1, int(parameters[-1])),
                (*(Choice("lowrank", chi, "plain") for chi in range(1, count)), DENSE),
                parameters,
                cost,
                parameters,
            )
        )
    return Menu(tuple(menus))


def large_menu(seed, noise, blocks=30):
    """A model's worth of options: spectra that decay with a power and an exponential, noise on the predicted costs."""
    rng = np.random.default_rng(seed)
    menus = []
    for block in range(blocks):
        for family, out, into in (("q", 576, 576), ("k", 192, 576), ("up", 1536, 576), ("down", 576, 1536)):
            index = np.arange(min(out, into))
            spectrum = (1 + 0.1 * index) ** -rng.uniform(0.5, 1.2) * np.exp(-rng.uniform(0.5, 3) * index / len(index))
            spectrum *= 0.1 * np.exp(rng.normal(0, 0.5))
            site = Site(f"b{block}.{family}", block, family, out, into)
            options = nested_options("pivoted-lowrank", "two-sided", spectrum, site)
            menus.append(envelope(site, [Option(o.choice, o.cost * np.exp(rng.normal(0, noise))) for o in options]))
    return Menu(tuple(menus))


def exhaustive_cost(menu, target):
    picks = itertools.product(*(range(len(site.choices)) for site in menu.sites))
    return min(menu.cost(np.array(pick)) for pick in picks if menu.parameters(np.array(pick)) <= target)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["any", "falling", "convex"])
@pytest.mark.parametrize("seed", range(20))
def test_the_cost_is_the_least_of_all_allocations_at_every_budget(seed, shape):
    menu = random_menu(seed, shape=shape)
    for target in range(menu.smallest_parameters, menu.dense_parameters + 3):
        found = knapsack(menu, target)
        assert menu.parameters(found.indices) <= target
        assert found.cost == menu.cost(found.indices)
        assert found.cost == pytest.approx(exhaustive_cost(menu, target), rel=1e-12, abs=1e-12)
        assert found.bound == found.cost


@pytest.mark.parametrize("seed", range(10))
def test_a_limit_that_bites_still_gives_a_bound_below_the_optimum(seed):
    menu = random_menu(seed, sites=6, options=4)
    exact = 0
    for target in range(menu.smallest_parameters, menu.dense_parameters, 3):
        best = knapsack(menu, target)
        for limit in (1, 2, 5):
            found = knapsack(menu, target, limit=limit)
            assert menu.parameters(found.indices) <= target
            assert found.bound <= best.cost * (1 + 1e-12) + 1e-12
            assert best.cost * (1 - 1e-12) <= found.cost <= menu.cost(lagrangian(menu, target))
            exact += found.bound == found.cost
    assert exact


def test_a_tolerance_stops_early_and_is_kept():
    menu = large_menu(0, 0.05, blocks=4)
    target = int(0.6 * menu.dense_parameters)
    best, near = knapsack(menu, target), knapsack(menu, target, tolerance=0.01)
    assert near.bound < near.cost <= 1.01 * near.bound
    assert near.bound <= best.cost <= near.cost


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_models_worth_of_options_is_solved_exactly_and_never_worse_than_the_hulls(noise):
    menu = large_menu(1, noise)
    for fraction in (0.6, 0.8):
        target = int(fraction * menu.dense_parameters)
        found = knapsack(menu, target)
        assert found.bound == found.cost < menu.cost(lagrangian(menu, target))
        assert menu.parameters(found.indices) <= target


def test_an_option_above_the_hull_is_taken_where_the_budget_ends():
    size = np.array([4, 7, 10])  # at 7 the hull costs 5
    choices = Choice("lowrank", 1, "plain"), Choice("lowrank", 2, "plain"), DENSE
    costs = np.array([10.0, 6.0, 0.0])
    menu = Menu(tuple(SiteMenu(Site(f"s{n}", n, "q", 1, 10), choices, size, costs, size) for n in range(2)))
    assert sorted(knapsack(menu, 13).indices) == [0, 1]
    assert sorted(knapsack(menu, 14).indices) == [0, 2]
    assert sorted(knapsack(menu, 17).indices) == [1, 2]


def test_a_menu_without_a_choice_and_a_budget_for_everything_are_solved():
    assert knapsack(Menu((dense_menu(Site("a", 0, "q", 4, 4)),)), 16).cost == 0
    menu = random_menu(0)
    assert knapsack(menu, 10 * menu.dense_parameters).cost == 0


def test_what_cannot_be_is_refused():
    menu = random_menu(0)
    with pytest.raises(ValueError, match=str(menu.smallest_parameters)):
        knapsack(menu, menu.smallest_parameters - 1)
    for wrong in ({"tolerance": -0.1}, {"limit": 0}):
        with pytest.raises(ValueError, match="tolerance must be at least 0 and limit at least 1"):
            knapsack(menu, menu.dense_parameters, **wrong)
