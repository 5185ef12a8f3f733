"""Prices and transfer: a schedule comes back from its prices, and a prior of one shape is placed where it belongs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from prior_document import SITES, document, written

from compression import DENSE, Menu, Site, SiteMenu, dense_menu, envelope, lagrangian, nested_options, to_schedule
from compression.allocation.closed_form import log_price
from compression.allocation.prices import departures
from envs import Problem
from search.priors.format import Prior
from search.priors.transfer import fits, transfer

FAMILIES = {"q": (16, 12), "down": (12, 32)}


def sites_of(blocks: int, families: Sequence[str] = ("q", "down"), scale: int = 1) -> list[Site]:
    return [
        Site(f"layers.{block}.{family}", block, family, *(scale * side for side in FAMILIES.get(family, (16, 16))))
        for block in range(blocks)
        for family in families
    ]


def menu_of(sites: Sequence[Site], seed: int = 0) -> Menu:
    """Convex menus of `pivoted-lowrank`."""
    generator = np.random.default_rng(seed)
    menus: list[SiteMenu] = []
    for site in sites:
        spectrum = np.sort(generator.exponential(generator.uniform(0.3, 2.0), min(site.out_features, site.in_features)))
        menus.append(envelope(site, nested_options("pivoted-lowrank", "two-sided", spectrum[::-1].copy(), site)))
    return Menu(tuple(menus))


def prior_of(sites: Sequence[Site], tmp_path: Path, chi: dict[str, int] | None = None) -> Prior:
    return Prior.read(written(tmp_path, document(tuple(sites), chi or {})))


@pytest.mark.parametrize("target", [0.3, 0.6, 0.9])
def test_the_closed_form_departs_nowhere_from_itself(target: float) -> None:
    menu = menu_of(sites_of(4))
    indices = lagrangian(menu, int(target * menu.dense_parameters))
    assert departures(menu, indices).tolist() == [0.0] * len(menu.sites)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("target", [0.3, 0.6, 0.9])
def test_a_schedule_comes_back_from_its_departures(seed: int, target: float) -> None:
    menu = menu_of(sites_of(5), seed)
    budget = int(target * menu.dense_parameters)
    weights = np.random.default_rng(seed).normal(0, 1.0, len(menu.sites))
    indices = lagrangian(menu, budget, weights)
    found = departures(menu, indices)
    again = lagrangian(menu, menu.parameters(indices), found)
    # The rest of a budget goes to an option that may lie above its hull; that one site may be off by its hull edge.
    off = [site for site, (one, other) in enumerate(zip(again, indices, strict=True)) if one != other]
    assert len(off) <= 2
    assert menu.parameters(again) <= menu.parameters(indices)
    # But for what the rest of the budget bought, nothing departs further than what made the schedule.
    assert np.sort(np.abs(found))[:-2].max() <= np.ptp(weights) + 1e-5


def test_a_price_lies_between_the_last_edge_bought_and_the_next() -> None:
    menu = menu_of(sites_of(3))
    prices = [log_price(menu, int(part * menu.dense_parameters)) for part in (0.3, 0.5, 0.7, 0.9)]
    assert prices == sorted(prices, reverse=True)
    assert log_price(Menu((dense_menu(SITES[0]),)), SITES[0].parameters) == 0.0


def test_a_problem_around_log_weights_has_their_schedule_as_its_closed_form() -> None:
    menu = menu_of(sites_of(4))
    weights = np.linspace(-1, 1, len(menu.sites))
    problem = Problem.build(menu, 0.6).centred(weights)
    assert problem.closed_form() == to_schedule(menu, lagrangian(menu, problem.target_parameters, weights))
    with pytest.raises(ValueError, match="log weights must be 8 finite numbers"):
        problem.centred(np.zeros(3))
    with pytest.raises(ValueError, match="log weights must be"):
        problem.centred(np.full(8, np.nan))


def test_on_its_own_model_a_prior_is_the_centre(tmp_path: Path) -> None:
    menu = menu_of(SITES)
    indices = lagrangian(menu, int(0.6 * menu.dense_parameters), np.array([2.0, -1, 0, 0, 1, -2]))
    schedule = to_schedule(menu, indices)
    chi = {name: choice.chi for name, choice in schedule if not choice.is_dense}
    prior = prior_of(SITES, tmp_path, chi)
    assert fits(prior, SITES)
    found = transfer(prior, menu)
    problem = Problem.build(menu, prior.kept_fraction).centred(found.log_weights)
    moved = [name for name, choice in problem.closed_form() if choice != schedule[name]]
    assert len(moved) <= 1
    assert problem.kept(problem.closed_form()) == pytest.approx(prior.kept_fraction, abs=0.03)


@pytest.mark.parametrize("blocks", [1, 2, 3, 7])
@pytest.mark.parametrize("scale", [1, 2])
def test_another_depth_and_width_meets_the_budget_and_keeps_the_order_of_the_blocks(
    blocks: int, scale: int, tmp_path: Path
) -> None:
    source = sites_of(3)
    chi = {f"layers.{block}.{family}": value for block, value in ((0, 9), (1, 5), (2, 1)) for family in FAMILIES}
    prior = prior_of(source, tmp_path, chi)
    target = sites_of(blocks, scale=scale)
    spectrum = {family: np.linspace(1, 0.1, scale * min(shape)) for family, shape in FAMILIES.items()}
    menu = Menu(
        tuple(
            envelope(site, nested_options("pivoted-lowrank", "two-sided", spectrum[site.family], site))
            for site in target
        )
    )
    found = transfer(prior, menu, "chi")
    problem = Problem.build(menu, prior.kept_fraction).centred(found.log_weights)
    schedule = problem.closed_form()
    assert problem.kept(schedule) <= prior.kept_fraction
    for family in FAMILIES:  # equal spectra: what one block gets over another comes from the prior alone
        chis = [10**6 if schedule[s.name] == DENSE else schedule[s.name].chi for s in target if s.family == family]
        assert chis == sorted(chis, reverse=True)
        assert blocks == 1 or chis[0] > chis[-1]
    if (blocks, scale) != (3, 1):
        assert "relative depth" in found.notes[0]


def test_offsets_are_interpolated_over_relative_depth_and_families_without_donors_left_alone(tmp_path: Path) -> None:
    values = document(tuple(sites_of(3)), {})
    for entry in values["sites"]:
        entry["offset"] = {0: 1.0, 1: 0.0, 2: -2.0}[entry["block"]] + (10.0 if entry["family"] == "down" else 0.0)
    prior = Prior.read(written(tmp_path, values))
    menu = menu_of(sites_of(5, ("q", "down", "gate")))
    found = transfer(prior, menu)
    by_family = {name: found.log_weights[place::3] for place, name in enumerate(("q", "down", "gate"))}
    assert by_family["q"] == pytest.approx([1.0, 0.5, 0.0, -1.0, -2.0])
    assert by_family["down"] == pytest.approx([11.0, 10.5, 10.0, 9.0, 8.0])
    assert by_family["gate"].tolist() == [0.0] * 5
    assert "5 sites of gate have no donor" in found.notes[1]


def test_what_cannot_be_transferred_is_refused(tmp_path: Path) -> None:
    prior = prior_of(sites_of(3), tmp_path)
    with pytest.raises(ValueError, match="have none in common"):
        transfer(prior, menu_of(sites_of(2, ("c_attn", "c_fc"))))
    values = json.loads(prior.to_json())
    for entry in values["sites"]:
        del entry["offset"]
    bare = Prior.read(written(tmp_path, values))
    with pytest.raises(ValueError, match="transfer must be chi for this prior"):
        transfer(bare, menu_of(sites_of(4)), "price")
    assert "relative χ" in transfer(bare, menu_of(sites_of(4))).notes[0]
