"""Pruned matrices in priors: fields and their rules, earlier versions, transfer to other models, and text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from prior_document import SITES, document

from compression import Menu, Site, envelope, lagrangian, nested_options, to_schedule
from compression.allocation.menu import Option
from compression.allocation.prices import departures
from compression.schedule import SPARSE, Choice
from envs import Problem
from search.priors.format import Prior
from search.priors.text import diff_text, show_text
from search.priors.transfer import exact_schedule, fits, transfer


def pruned(shares: Sequence[float] = (0.5, 0.75), sites: tuple[Site, ...] = SITES) -> dict[str, Any]:
    """A prior whose matrices are pruned, in turn, to these shares of their entries."""
    values = document(sites, {})
    for number, entry in enumerate(values["sites"]):
        kept = int(shares[number % len(shares)] * entry["shape"][0] * entry["shape"][1])
        entry |= {"topology": SPARSE, "entries": kept, "parameters": kept, "metric": "two-sided"}
    return closed(values)


def closed(values: dict[str, Any]) -> dict[str, Any]:
    """The same with the sums of its sites, and without a digest."""
    stored = sum(entry["parameters"] for entry in values["sites"])
    whole = sum(entry["shape"][0] * entry["shape"][1] for entry in values["sites"])
    return values | {"kept_fraction": stored / whole, "schedule_digest": None}


def menu_of(sites: Sequence[Site]) -> Menu:
    """χ and ten densities per site, of which densities cost less."""
    menus = []
    for number, site in enumerate(sites):
        rate = 6 + 0.37 * (number % 7)
        spectrum = np.linspace(2, 0.1, min(site.out_features, site.in_features))
        options = nested_options("pivoted-lowrank", "two-sided", spectrum, site)
        shares = np.arange(1, 10) / 10
        options += [
            Option(Choice(SPARSE, int(share * site.parameters), "two-sided"), float(np.exp(-rate * share)))
            for share in shares
        ]
        menus.append(envelope(site, options))
    return Menu(tuple(menus))


def test_a_pruned_matrix_is_its_number_of_entries_and_is_written_as_it_was_read() -> None:
    prior = Prior.parse(json.dumps(pruned()))
    choices = [choice for _, choice in prior.schedule]
    assert choices[:2] == [Choice(SPARSE, 48, "two-sided"), Choice(SPARSE, 144, "two-sided")]
    assert [site.relative_density for site in prior.sites[:2]] == [0.5, 0.75]
    assert [(site.relative_chi, site.relative_width) for site in prior.sites[:2]] == [(1.0, 1.0)] * 2
    assert prior.is_small
    assert Prior.parse(prior.to_json()) == prior
    assert exact_schedule(prior, SITES) == prior.schedule
    assert Prior.parse(json.dumps(document() | {"version": 3})).schedule == Prior.parse(json.dumps(document())).schedule


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entries": 0}, "sites.0.entries: must be greater than or equal to 1, got 0"),
        ({"entries": 97, "parameters": 97}, "entries must be at most 96, got 97"),
        ({"entries": None}, "is pruned: it needs entries and metric, and no chi, legs, bonds or dense_because"),
        ({"metric": None}, "is pruned: it needs entries and metric"),
        ({"chi": 3}, "is pruned: it needs entries and metric, and no chi"),
        ({"dense_because": "a head"}, "no chi, legs, bonds or dense_because"),
        ({"parameters": 47}, "sites.0.parameters must be 48, got 47"),
        ({"topology": "dense"}, "is dense and has no chi, metric, legs or entries"),
        (
            {"topology": "lowrank"},
            "has topology lowrank and no entries or bits, which only a pruned or rounded matrix has",
        ),
    ],
)
def test_a_bad_pruned_matrix_is_refused_in_one_line(changes: dict[str, object], message: str) -> None:
    values = pruned()
    values["sites"][0] |= changes
    with pytest.raises(ValueError, match=message) as refused:
        Prior.parse(json.dumps(closed(values)))
    assert "\n" not in str(refused.value)


def rounded(bits: Sequence[int] = (4, 3), sites: tuple[Site, ...] = SITES) -> dict[str, Any]:
    """A prior whose matrices have, in turn, so many bits; the second of every three is pruned too."""
    values = document(sites, {})
    for number, entry in enumerate(values["sites"]):
        entry |= {"topology": "dense", "bits": bits[number % len(bits)], "metric": "two-sided"}
        entry["parameters"] = entry["shape"][0] * entry["shape"][1]
        if number % 3 == 1:
            entry |= {"topology": SPARSE, "entries": 9, "parameters": 9}
    return closed(values)


def test_a_rounded_matrix_has_its_bits_and_is_written_as_it_was_read() -> None:
    prior = Prior.parse(json.dumps(rounded()))
    choices = [choice for _, choice in prior.schedule]
    assert choices[:2] == [Choice("dense", 0, "two-sided", bits=4), Choice(SPARSE, 9, "two-sided", bits=3)]
    assert [site.relative_bits for site in prior.sites[:2]] == [0.25, 0.1875]
    assert prior.is_small
    assert Prior.parse(prior.to_json()) == prior
    assert exact_schedule(prior, SITES) == prior.schedule
    assert " 4b" in show_text(prior)
    assert "p0.0" in show_text(prior)
    other = Prior.parse(json.dumps(rounded((8, 3))))
    assert "in 4 bits → in 8 bits" in diff_text(prior, other)
    menu = Menu(tuple(envelope(site, [Option(Choice("dense", 0, "two-sided", bits=4), 0.1)]) for site in SITES))
    pruned_menu = menu_of(SITES)
    with pytest.raises(ValueError, match="the prior has rounded matrices, and the menu offers none; take --form small"):
        transfer(prior, pruned_menu, "chi")
    with pytest.raises(ValueError, match="the prior has pruned matrices, and the menu offers none"):
        transfer(prior, menu, "chi")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 7}, "sites.0.bits: must be 8, 6, 5, 4, 3 or 2, got 7"),
        ({"metric": None}, "is rounded: it needs a metric, and no bonds or dense_because"),
        ({"dense_because": "a head"}, "is rounded: it needs a metric, and no bonds or dense_because"),
        ({"bits": None}, "is dense and has no chi, metric, legs or entries"),
        ({"chi": 3}, "is dense and has no chi, metric, legs or entries"),
    ],
)
def test_a_bad_rounded_matrix_is_refused_in_one_line(changes: dict[str, object], message: str) -> None:
    values = rounded()
    values["sites"][0] |= changes
    with pytest.raises(ValueError, match=message) as refused:
        Prior.parse(json.dumps(closed(values)))
    assert "\n" not in str(refused.value)


def test_densities_are_transferred_to_a_model_of_another_depth_and_scaled_to_its_target() -> None:
    prior = Prior.parse(json.dumps(pruned((0.4, 0.8))))
    sites = [
        Site(f"layers.{block}.{family}", block, family, *shape)
        for block in range(5)
        for family, shape in (("q", (20, 16)), ("down", (16, 48)))
    ]
    assert not fits(prior, sites)
    menu = menu_of(sites)
    problem = Problem.build(menu, 0.62)
    found = problem.centred(transfer(prior, menu, "chi").log_weights).closed_form()
    kept = {family: [] for family in ("q", "down")}
    for site in sites:
        assert found[site.name].is_sparse
        kept[site.family].append(found[site.name].chi / site.parameters)
    assert np.mean(kept["q"]) < np.mean(kept["down"]) - 0.1
    dense_or_chi = Menu(tuple(envelope(site, nested_options("lowrank", "input", np.ones(16), site)) for site in sites))
    with pytest.raises(ValueError, match="the prior has pruned matrices, and the menu offers none; take --form small"):
        transfer(prior, dense_or_chi, "chi")


def test_a_schedule_with_pruned_matrices_comes_back_from_its_departures() -> None:
    menu = menu_of([Site(f"layers.{n}.q", n, "q", 20, 16) for n in range(12)])
    weights = np.random.default_rng(0).normal(0, 1.0, 12)
    indices = lagrangian(menu, int(0.55 * menu.dense_parameters), weights)
    again = lagrangian(menu, menu.parameters(indices), departures(menu, indices))
    assert any(choice.is_sparse for _, choice in to_schedule(menu, indices))
    assert int((again != indices).sum()) <= 2  # the rest of the budget may buy an option above its hull


def test_a_prior_with_pruned_matrices_is_shown_and_compared() -> None:
    prior = Prior.parse(json.dumps(pruned()))
    text = show_text(prior)
    assert text.splitlines()[4].split()[-2:] == ["p0.50", "p0.75"]
    assert "or p and the share of the entries that are stored of a pruned matrix (6 sites)" in text
    said = diff_text(prior, Prior.parse(json.dumps(pruned((0.25, 0.75)))))
    assert "3 sites differ" in said
    assert "blocks.0.q: pruned to 0.500 → pruned to 0.250" in said
