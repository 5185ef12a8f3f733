"""Menus keep what no other option beats; topologies follow dimensions and heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compression import (
    Choice,
    FactorCache,
    FactorStore,
    Site,
    collect,
    contract,
    discover_sites,
    fitted_topologies,
    shrink,
)
from compression.allocation.closed_form import lagrangian
from compression.allocation.menu import Menu, Option, aligned, convex_hull, envelope, nested_options, worth_their_time
from compression.decomposition.factors import OPTIMISM
from compression.sites import dense_weight
from search.model.loading import load_model

SITE = Site("layers.3.self_attn.o_proj", 3, "o", 24, 24)


def test_an_option_that_another_beats_is_left_out() -> None:
    spectrum = np.linspace(2, 0.1, 24)
    plain = nested_options("pivoted-lowrank", "two-sided", spectrum, SITE)
    better = Option(Choice("pivoted-mpo:4.6x4.6", 4, "two-sided"), 0.9 * plain[4].cost)
    worse = Option(Choice("pivoted-mpo:4.6x4.6", 8, "two-sided"), plain[0].cost)
    menu = envelope(SITE, [*plain, better, worse])
    assert better.choice in menu.choices
    assert worse.choice not in menu.choices
    assert (np.diff(menu.parameters) > 0).all()
    assert (np.diff(menu.cost) < 0).all()
    assert menu.multiply_adds.max() == SITE.parameters


def test_gauge_fixing_offers_every_rank_below_full_and_plain_factors_only_half() -> None:
    spectrum = np.linspace(2, 0.1, 24)
    assert len(nested_options("pivoted-lowrank", "plain", spectrum, SITE)) == 23
    assert len(nested_options("lowrank", "plain", spectrum, SITE)) == 11


def test_topologies_follow_the_dimensions_and_the_heads_of_attention() -> None:
    assert fitted_topologies(SITE, 8) == ("pivoted-mpo:6.4x6.4", "pivoted-mpo:3.8x3.8")
    assert fitted_topologies(SITE) == ("pivoted-mpo:6.4x6.4",)
    assert fitted_topologies(Site("layers.3.mlp.up", 3, "up", 48, 24), 8) == ("pivoted-mpo:8.6x6.4",)
    assert fitted_topologies(Site("layers.3.mlp.up", 3, "up", 13, 24), 8) == ()
    assert fitted_topologies(SITE, None, (3,)) == ("pivoted-mpo:4.3.2x4.3.2",)


@pytest.mark.slow
def test_a_menu_with_fits_is_never_worse_than_without() -> None:
    loaded = load_model("random:tiny-llama", torch.device("cpu"), torch.float32)
    sites = [site for site in discover_sites(loaded.model) if site.block == 0]
    ids = torch.randint(0, 100, (4, 64), generator=torch.Generator().manual_seed(0))
    batches = [(ids, torch.ones_like(ids, dtype=torch.bool))]
    statistics = collect(loaded.model, sites, batches, torch.Generator().manual_seed(1))
    weights = {site.name: dense_weight(loaded.model.get_submodule(site.name)) for site in sites}
    store = FactorStore(sites, weights, lambda: statistics, "k", 0.01, FactorCache(None))
    plain = store.menu()
    full = store.menu(fitted={site.name: fitted_topologies(site, 8) for site in sites})
    fits = 0
    for one, other in zip(plain.sites, full.sites, strict=True):
        at = np.searchsorted(other.parameters, one.parameters, side="right") - 1
        assert (other.cost[at] <= one.cost + 1e-12).all()
        fits += sum("mpo" in choice.topology for choice in other.choices)
        for choice, cost in zip(other.choices, other.cost, strict=True):
            if "mpo" in choice.topology:
                error = weights[one.site.name].double() - _matrix(store, one.site.name, choice)
                c, g = (store._measured.moments(one.site.name, "two-sided")[side] for side in (0, 1))
                exact = 0.5 * float(torch.trace(shrink(g, 0.01) @ error @ shrink(c, 0.01) @ error.T))
                assert cost == pytest.approx(OPTIMISM * exact, rel=1e-3)
    assert fits > 0


def _matrix(store: FactorStore, name: str, choice: Choice) -> torch.Tensor:
    return contract([core.double() for core in store.cores(name, choice)])


def site_menus() -> Menu:
    menus = []
    for number, top in enumerate((2.0, 1.0, 4.0)):
        site = Site(f"layers.{number}.o_proj", number, "o", 24, 24)
        menus.append(envelope(site, nested_options("pivoted-lowrank", "two-sided", np.geomspace(top, 0.01, 24), site)))
    return Menu(tuple(menus))


def slowness(menu: Menu) -> list[np.ndarray]:
    """Factors take a fixed time and one by their size; from three quarters of the parameters on longer than dense."""
    return [np.append(0.25 + options.parameters[:-1] / options.parameters[-1], 1.0) for options in menu.sites]


def test_a_menu_without_burdens_keeps_its_hull_and_is_allocated_alike() -> None:
    menu = site_menus()
    thin = worth_their_time(menu, [np.zeros(len(options.choices)) for options in menu.sites])
    for options, kept in zip(menu.sites, thin.sites, strict=True):
        assert kept.choices == tuple(options.choices[index] for index in convex_hull(options.parameters, options.cost))
    for share in (0.4, 0.6, 0.8):
        target = int(share * menu.dense_parameters)
        assert thin.cost(lagrangian(thin, target)) == pytest.approx(menu.cost(lagrangian(menu, target)), rel=0.02)


def test_options_that_are_slower_than_dense_go_and_the_allocation_becomes_faster_for_little() -> None:
    menu = site_menus()
    times = slowness(menu)
    thin = worth_their_time(menu, [10 * each for each in times])
    target = int(0.6 * menu.dense_parameters)
    spent = []
    for one in (menu, thin):
        taken = [options.choices[index] for options, index in zip(one.sites, lagrangian(one, target), strict=True)]
        places = [options.choices.index(choice) for options, choice in zip(menu.sites, taken, strict=True)]
        spent.append(sum(float(time[place]) for time, place in zip(times, places, strict=True)))
        assert one.parameters(lagrangian(one, target)) <= target
    assert spent[1] < spent[0]
    for options, kept in zip(menu.sites, thin.sites, strict=True):
        assert {options.choices[0], options.choices[-1]} <= set(kept.choices) <= set(options.choices)
        assert kept.parameters[-2] < 0.75 * options.parameters[-1]
        assert kept.cost[-1] == 0


def test_aligned_menus_keep_their_ends_and_every_multiple() -> None:
    menu = site_menus()
    chis = [choice.chi for choice in menu.sites[0].choices[:-1]]
    for options, kept in zip(menu.sites, [aligned(each, 3) for each in menu.sites], strict=True):
        assert [choice.chi for choice in kept.choices[:-1]] == [chi for chi in chis if chi == chis[0] or chi % 3 == 0]
        assert kept.choices[-1].is_dense
        places = [options.choices.index(choice) for choice in kept.choices]
        assert kept.cost.tolist() == options.cost[places].tolist()
        assert kept.parameters.tolist() == options.parameters[places].tolist()


def test_a_site_with_few_aligned_bond_dimensions_keeps_them_all() -> None:
    menu = site_menus()
    assert all(aligned(each, 8) is each for each in menu.sites)
