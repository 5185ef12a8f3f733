"""Allocation against exhaustive search, and the invariances that agents rely on."""

import itertools

import numpy as np
import pytest

from compression import Menu, Site, SiteMenu, envelope, lagrangian, nested_options, to_schedule, uniform


def lowrank_menu(site: Site, spectrum: np.ndarray, metric: str) -> SiteMenu:
    return envelope(site, nested_options("lowrank", metric, spectrum, site))


def small_menu(seed: int = 0, sites: int = 4) -> Menu:
    rng = np.random.default_rng(seed)
    menus = []
    for number in range(sites):
        spectrum = np.sort(rng.exponential(1.0, 6) * rng.uniform(0.2, 3.0))[::-1]
        menus.append(lowrank_menu(Site(f"s{number}", number, "q", 8, 6), spectrum, "two-sided"))
    return Menu(tuple(menus))


def exhaustive_cost(menu: Menu, target: int) -> float:
    options = [range(len(site.choices)) for site in menu.sites]
    return min(
        menu.cost(np.array(pick)) for pick in itertools.product(*options) if menu.parameters(np.array(pick)) <= target
    )


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("fraction", [0.4, 0.6, 0.8, 0.95])
def test_lagrangian_is_feasible_and_near_the_exhaustive_optimum(seed: int, fraction: float) -> None:
    menu = small_menu(seed)
    target = int(fraction * menu.dense_parameters)
    indices = lagrangian(menu, target)
    assert menu.parameters(indices) <= target
    best = exhaustive_cost(menu, target)
    coarsest = max(float(-np.diff(site.cost).min()) for site in menu.sites)  # one option is the resolution of a hull
    assert best - 1e-12 <= menu.cost(indices) <= best + coarsest


def test_lagrangian_equals_the_optimum_when_the_budget_ends_on_the_hull() -> None:
    menu = small_menu(3)
    indices = lagrangian(menu, menu.dense_parameters * 3 // 4)
    target = menu.parameters(indices)
    again = lagrangian(menu, target)
    assert menu.cost(again) == pytest.approx(exhaustive_cost(menu, target), rel=0.25)


def test_more_budget_never_costs_more() -> None:
    menu = small_menu(1)
    costs = [
        menu.cost(lagrangian(menu, target)) for target in range(menu.smallest_parameters, menu.dense_parameters + 1, 2)
    ]
    assert costs[-1] == 0
    assert np.polyfit(range(len(costs)), costs, 1)[0] < 0


def test_a_constant_added_to_all_weights_changes_nothing() -> None:
    menu, weights = small_menu(2), np.array([0.3, -0.2, 0.0, 1.0])
    target = int(0.7 * menu.dense_parameters)
    assert (lagrangian(menu, target, weights) == lagrangian(menu, target, weights + 5.0)).all()


def test_a_heavier_site_keeps_at_least_as_much() -> None:
    menu = small_menu(4)
    target = int(0.6 * menu.dense_parameters)
    before = lagrangian(menu, target)
    after = lagrangian(menu, target, np.array([3.0, 0.0, 0.0, 0.0]))
    assert after[0] >= before[0]
    assert menu.sites[0].choices[lagrangian(menu, target, np.array([30.0, 0, 0, 0]))[0]].is_dense


def test_forced_dense_sites_stay_dense() -> None:
    menu = small_menu(5)
    indices = lagrangian(menu, int(0.6 * menu.dense_parameters), dense=frozenset({2}))
    assert menu.sites[2].choices[indices[2]].is_dense
    assert menu.parameters(indices) <= int(0.6 * menu.dense_parameters)


def test_an_unreachable_budget_is_refused_with_the_reachable_one() -> None:
    menu = small_menu()
    for allocate in (lagrangian, uniform):
        with pytest.raises(ValueError, match=str(menu.smallest_parameters)):
            allocate(menu, menu.smallest_parameters - 1)
    assert menu.parameters(lagrangian(menu, menu.smallest_parameters)) == menu.smallest_parameters


def test_uniform_gives_every_site_about_the_same_fraction() -> None:
    sites = (Site("a", 0, "q", 64, 64), Site("b", 0, "up", 128, 64))
    menu = Menu(tuple(lowrank_menu(site, np.linspace(2, 0.1, 64), "plain") for site in sites))
    indices = uniform(menu, int(0.5 * menu.dense_parameters))
    for site, index in zip(menu.sites, indices, strict=True):
        assert site.parameters[index] / site.site.parameters == pytest.approx(0.5, abs=0.04)
        assert not site.choices[index].is_dense
    assert menu.parameters(indices) <= 0.5 * menu.dense_parameters


def test_cost_of_chi_is_half_the_discarded_squares() -> None:
    menu = lowrank_menu(Site("a", 0, "q", 8, 6), np.array([3.0, 2.0, 1.0, 0.5, 0.25, 0.0]), "two-sided")
    assert menu.cost[0] == pytest.approx(0.5 * (4 + 1 + 0.25 + 0.0625))
    assert [choice.chi for choice in menu.choices] == [1, 2, 3, 0]
    assert menu.cost[-1] == 0


def test_to_schedule_names_every_site_in_order() -> None:
    menu = small_menu()
    schedule = to_schedule(menu, lagrangian(menu, int(0.7 * menu.dense_parameters)))
    assert [name for name, _ in schedule] == ["s0", "s1", "s2", "s3"]
