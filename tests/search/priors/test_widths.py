"""Priors with widths: nothing is lost between a store's menu, a file and a model, and what cannot be is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prior_document import written
from torch import nn

from compression import FactorCache, FactorStore, Menu, Schedule, Site, collect, discover_sites, lagrangian, to_schedule
from compression.allocation.prices import departures
from compression.bonds import discover_bonds, with_bonds
from compression.schedule import DENSE, Choice
from compression.sites import Cut, Unit, dense_weight
from compression.size import SizeModel
from envs import Problem
from search import cli
from search.config import Config
from search.data.splits import Splits, Text
from search.model.loading import LoadedModel, load_model
from search.priors.build import build_prior
from search.priors.format import Prior, PriorSite
from search.priors.text import diff_text, show_text
from search.priors.transfer import check_families, exact_schedule, fits, transfer

EMPTY = Text((), (), frozenset())
NOTHING = Splits(EMPTY, EMPTY, (), EMPTY, ())
LLAMA, QWEN, GPT = "random:tiny-llama", "random:tiny-qwen2", "random:tiny-gpt2"


@cache
def opened(name: str = LLAMA) -> tuple[LoadedModel, FactorStore]:
    """A tiny model with its bonds."""
    loaded = load_model(name, "cpu")
    model: nn.Module = loaded.model
    sites = discover_sites(model)
    sites = with_bonds(sites, discover_bonds(model, sites))
    weights = {site.name: dense_weight(model.get_submodule(site.name)) for site in sites if not site.dense_because}
    ids = torch.randint(0, 100, (8, 64), generator=torch.Generator().manual_seed(0))
    batches = [(ids, torch.ones_like(ids, dtype=torch.bool))]
    statistics = collect(model, sites, batches, torch.Generator().manual_seed(1))
    return loaded, FactorStore(sites, weights, lambda: statistics, "key", 0.01, FactorCache(None))


@cache
def menu_of(name: str = LLAMA, form: Any = "any") -> Menu:
    return opened(name)[1].menu(form=form)


def prior_of(schedule: Schedule, menu: Menu | None = None, name: str = LLAMA) -> Prior:
    loaded, _ = opened(name)
    return build_prior(Config(target_kept=0.7), loaded, menu or menu_of(name), schedule, [], NOTHING)


def chosen(kept: float = 0.7, name: str = LLAMA, form: Any = "any") -> Schedule:
    menu = menu_of(name, form)
    return to_schedule(menu, lagrangian(menu, int(kept * menu.dense_parameters)))


def uncut(sites: Sequence[Site]) -> tuple[Site, ...]:
    return tuple(replace(site, cuts=()) for site in sites)


@pytest.mark.parametrize("name", [LLAMA, QWEN, GPT])
@pytest.mark.parametrize("form", ["any", "plain"])
def test_a_schedule_of_a_real_menu_comes_back_from_a_file(name: str, form: Any, tmp_path: Path) -> None:
    loaded, store = opened(name)
    schedule = chosen(0.6, name, form)
    assert any(choice.widths for _, choice in schedule)
    made = prior_of(schedule, menu_of(name, form), name)
    again = Prior.read(written(tmp_path, made.to_json()))
    assert again == made
    assert again.to_json() == made.to_json()
    assert again.schedule == schedule
    assert again.schedule_digest == schedule.digest
    assert fits(again, store.sites)
    assert exact_schedule(again, store.sites) == schedule
    assert again.kept_fraction == pytest.approx(SizeModel(loaded.model, store.sites).size(schedule).kept_fraction)
    for site, (_, choice) in zip(again.sites, schedule, strict=True):
        if choice.widths:
            shape = [site.shape[0], site.shape[1]]
            assert site.bonds is not None
            [bond] = site.bonds
            shape[bond.side == "in"] = shape[bond.side == "in"] * choice.widths[0] // bond.groups
            assert site.parameters == (prod(shape) if site.chi is None else site.chi * (sum(shape) - site.chi))
            assert site.out_legs in (None, (shape[0], 1))


def test_the_sites_of_a_unit_share_its_offset_and_the_reader_has_the_cost_of_every_width() -> None:
    menu, store = menu_of(form="plain"), opened()[1]
    schedule = chosen(0.5, form="plain")
    for unit in (options.site for options in menu.sites if isinstance(options.site, Unit)):
        sites = [site for site in prior_of(schedule, menu).sites if site.name in {one.name for one in unit.sites}]
        assert len({site.offset for site in sites}) == 1
        assert sites[0].offset is not None
        bonds = [bond for site in sites for bond in site.bonds or ()]
        assert [bond.sensitivity is not None for bond in bonds] == [bond.side == "in" for bond in bonds]
        if bonds and (trace := bonds[-1].sensitivity) is not None:
            counted = 2 if unit.family == "self_attn" else 1  # menus double the cost of removing heads
            exact = counted * store.bonds.elimination(unit.name).cost
            assert trace.kl == pytest.approx([float(exact[width]) for width in trace.width], rel=1e-5)


def test_widths_of_zero_leave_nothing_and_are_still_a_prior(tmp_path: Path) -> None:
    gone = {"model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"}
    sites = opened()[1].sites
    nothing = Choice("dense", 0, "none", (0,))
    schedule = Schedule(tuple((site.name, nothing if site.name in gone else DENSE) for site in sites))
    prior = Prior.read(written(tmp_path, prior_of(schedule).to_json()))
    assert {site.name for site in prior.sites if site.parameters == 0} == gone
    assert exact_schedule(prior, sites) == schedule
    assert "0/48" in show_text(prior)


def test_every_option_of_a_menu_is_nearest_to_itself() -> None:
    menu = menu_of()
    places = [np.linspace(0, len(options.choices) - 1, 6).astype(int) for options in menu.sites]
    for column in range(6):
        indices = np.array([of[column] for of in places])
        prior = prior_of(to_schedule(menu, indices))
        assert np.array_equal(transfer(prior, menu).log_weights, departures(menu, indices))


def test_a_prior_with_widths_is_the_centre_on_its_own_model() -> None:
    menu = menu_of()
    weights = np.linspace(-1, 1, len(menu.sites))
    schedule = to_schedule(menu, lagrangian(menu, int(0.6 * menu.dense_parameters), weights))
    prior = prior_of(schedule)
    problem = Problem.build(menu, prior.kept_fraction).centred(transfer(prior, menu).log_weights)
    moved = {name.rpartition(".")[0] for name, choice in problem.closed_form() if choice != schedule[name]}
    assert len(moved) <= 2  # what the rest of a budget buys may lie above the hull
    assert schedule != chosen(0.6)


def cut_to(sites: Sequence[Site], part: float) -> Schedule:
    """Every MLP of a model at a part of its width, and nothing else."""
    return Schedule(
        tuple(
            (
                site.name,
                Choice("dense", 0, "none", (round(part * site.cuts[0].groups),)) if ".mlp." in site.name else DENSE,
            )
            for site in sites
        )
    )


@pytest.mark.parametrize("rule", ["chi", "price"])
def test_relative_widths_are_rounded_to_the_groups_of_another_model(rule: Any) -> None:
    source, target = opened()[1].sites, opened(QWEN)[1].sites
    groups = {site.cuts[0].groups for site in target if ".mlp." in site.name}
    prior = prior_of(cut_to(source, 0.5), menu_of(form="plain"))
    menu = menu_of(QWEN, "plain")
    shallow = Menu(tuple(options for options in menu.sites if options.site.block < 2))  # two blocks where it has three
    found = transfer(prior, shallow, rule)
    schedule = Problem.build(shallow, prior.kept_fraction).centred(found.log_weights).closed_form()
    assert "relative depth" in found.notes[0]
    if rule == "chi":
        [full] = groups
        widths = {choice.widths for name, choice in schedule if ".mlp." in name}
        assert all(abs(width / full - 0.5) <= 0.25 for of in widths for width in of)
        assert widths != {()}


def test_a_prior_without_widths_starts_a_choice_of_widths_and_factors() -> None:
    menu, single = menu_of(), menu_of(form="factors")
    schedule = to_schedule(single, lagrangian(single, int(0.6 * single.dense_parameters)))
    prior = prior_of(schedule, single)
    assert not prior.has_widths
    assert all(site.offset is not None and site.sensitivity is not None for site in prior.sites)
    found = transfer(prior, menu)
    assert found.log_weights.shape == (len(menu.sites),)
    assert np.isfinite(found.log_weights).all()
    with pytest.raises(ValueError, match="the prior has factors, and the menu offers widths alone"):
        transfer(prior, menu_of(form="plain"))


def test_a_prior_with_widths_is_refused_where_they_cannot_be_taken() -> None:
    prior = prior_of(chosen(0.5, form="plain"), menu_of(form="plain"))
    sites = opened()[1].sites
    check_families(prior, sites)
    with pytest.raises(
        ValueError, match=r"a prior with widths is for a model that can take them, but no bond cuts \S+"
    ):
        check_families(prior, uncut(sites))
    with pytest.raises(ValueError, match="the prior has widths, and the menu offers factors alone"):
        transfer(prior, menu_of(form="factors"))
    assert not fits(prior, uncut(sites))
    with pytest.raises(
        ValueError, match=r"the prior cuts \S+ by \S+ \(\d+ groups, side '\w+'\), a bond that the model"
    ):
        exact_schedule(prior, uncut(sites))
    bare = Prior.of(json.loads(prior_of(Schedule.dense(tuple(site.name for site in sites))).to_json()))
    check_families(bare, uncut(sites))  # nothing of it is cut


BOND = "blocks.0.mlp"


def bonded() -> dict[str, Any]:
    """A prior with one MLP whose eight hidden units are cut to six; the reader also has factors."""
    bond = {"name": BOND, "groups": 8, "width": 6}
    trace = {"source": "predicted", "width": [0, 4], "kl": [0.5, 0.125]}
    up: dict[str, Any] = {"name": f"{BOND}.up", "block": 0, "family": "up", "shape": [16, 12], "topology": "dense"}
    up |= {"bonds": [bond | {"side": "out"}], "parameters": 144}
    down: dict[str, Any] = {"name": f"{BOND}.down", "block": 0, "family": "down", "shape": [12, 16]}
    down |= {"topology": "pivoted-lowrank", "bonds": [bond | {"side": "in", "sensitivity": trace}]}
    down |= {"chi": 3, "metric": "two-sided", "out_legs": [12, 1], "in_legs": [1, 12], "parameters": 63}
    choices = (
        (f"{BOND}.up", Choice("dense", 0, "none", (6,))),
        (f"{BOND}.down", Choice("pivoted-lowrank", 3, "two-sided", (6,))),
    )
    return {
        "format": "chisel-prior",
        "version": 5,
        "model": {"id": "toy", "digest": "0" * 64, "license": "none"},
        "target_kept": 0.8,
        "kept_fraction": (144 + 63) / 384,
        "schedule_digest": Schedule(choices).digest,
        "seeds": {"run": 0},
        "sites": [up, down],
        "scores": [],
        "data": dict.fromkeys(("calibration", "search_text", "heldout_text"), "1" * 64) | {"search_items": []},
        "configuration": {},
        "environment": {},
    }


def changed(changes: dict[str, object]) -> dict[str, Any]:
    values: Any = copy.deepcopy(bonded())
    for place, value in changes.items():
        *path, last = [int(key) if key.isdigit() else key for key in place.split(".")]
        at = values["sites"]
        for key in path:
            at = at[key]
        if value is ...:
            del at[last]
        else:
            at[last] = value
    return values


SAME = "all sites of the bond blocks.0.mlp must have the same"
WRONG: list[tuple[dict[str, object], str]] = [
    ({"0.bonds.0.groups": 7}, "the groups of blocks.0.mlp must divide the 16 outputs, got 7"),
    ({"1.bonds.0.groups": 7}, "the groups of blocks.0.mlp must divide the 16 inputs, got 7"),
    ({"0.bonds.0.width": 9}, "the width of blocks.0.mlp must be at most 8, its full width, got 9"),
    ({"0.bonds.0.width": -1}, "sites.0.bonds.0.width: must be greater than or equal to 0, got -1"),
    ({"0.bonds.0.width": 6.0}, "sites.0.bonds.0.width: must be a valid integer, got 6.0"),
    ({"0.bonds.0.width": 5, "0.parameters": 120}, f"{SAME} width, but {BOND}.up has 5 and {BOND}.down has 6"),
    ({"0.bonds.0.groups": 16, "0.parameters": 72}, f"{SAME} groups, but {BOND}.up has 16 and {BOND}.down has 8"),
    ({"0.block": 1}, f"{SAME} block, but {BOND}.up has 1 and {BOND}.down has 0"),
    ({"0.bonds": ...}, "one site must read the bond blocks.0.mlp with side 'in' and others must write it"),
    ({"1.bonds.0.side": "up"}, "sites.1.bonds.0.side: must be 'out' or 'in', got 'up'"),
    ({"0.bonds.0.side": "in", "0.shape": [12, 16]}, "got 2 that read and 0 that write"),
    ({"0.bonds": []}, "sites.0.bonds: "),
    ({"0.bonds.0.rank": 3}, "sites.0.bonds.0.rank is not a field of version 5"),
    ({"0.dense_because": "shared"}, f"{BOND}.up has a dense_because, so no bond can cut it"),
    ({"0.chi": 3}, f"{BOND}.up is dense and has no chi"),
    ({"0.parameters": 192}, "sites.0.parameters must be 144, got 192"),
    ({"1.in_legs": [1, 16]}, "the legs of pivoted-lowrank are (12, 1) and (1, 12)"),
    ({"1.chi": 12}, f"sites.1.chi of {BOND}.down must be at most 11"),
    ({"1.bonds.0.width": 0}, f"{BOND}.down must have topology dense where a width of 0 leaves nothing"),
    ({"1.bonds.0.sensitivity.width": [4, 0]}, "the width of a trace must ascend"),
    ({"1.bonds.0.sensitivity.kl": [1.0]}, "a trace needs one KL for each width, got 1 for 2"),
    ({"1.bonds.0.sensitivity.width": [0, 9]}, "the widths of a trace must be at most 8"),
]
TWO = [{"name": BOND, "groups": 8, "width": 6, "side": "out"}, {"name": "b", "groups": 8, "width": 6, "side": "out"}]
TRACE = {"source": "predicted", "width": [1], "kl": [0.5]}
WRONG += [
    ({"0.bonds": TWO}, f"{BOND}.up can have one bond on each side, got two with side 'out'"),
    ({"0.bonds.0.sensitivity": TRACE}, "the sensitivity of a bond belongs to the matrix that reads it"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(list(changes)) for changes, _ in WRONG])
def test_a_bad_bond_is_refused_in_one_line(
    changes: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Prior.parse(json.dumps(bonded())).has_widths
    assert cli.main(["prior", "validate", str(written(tmp_path, changed(changes)))]) == cli.REFUSED
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_another_width_is_another_schedule(tmp_path: Path) -> None:
    changes: dict[str, object] = {"0.bonds.0.width": 8, "0.parameters": 192, "1.bonds.0.width": 8}
    changes |= {"1.in_legs": [1, 16], "1.parameters": 3 * (12 + 16 - 3)}
    values = changed(changes) | {"kept_fraction": (192 + 75) / 384}
    with pytest.raises(ValueError, match="schedule_digest must be that of the sites"):
        Prior.read(written(tmp_path, values))
    prior = Prior.read(written(tmp_path, values | {"schedule_digest": None}))
    assert [choice.widths for _, choice in prior.schedule] == [(8,), (8,)]


def test_a_chi_too_large_for_what_a_bond_leaves_is_lowered_when_asked(tmp_path: Path) -> None:
    values = changed({"1.chi": 12, "1.parameters": 144}) | {"schedule_digest": None, "kept_fraction": 0.75}
    prior = Prior.read(written(tmp_path, values), clamp=True)
    assert [site.chi for site in prior.sites] == [None, 11]
    assert prior.sites[1].parameters == 11 * (12 + 12 - 11)


def test_sites_that_a_bond_of_the_model_joins_must_have_one_width() -> None:
    up = Site(f"{BOND}.up", 0, "up", 16, 12, cuts=(Cut(BOND, 8, 2, of_rows=True),))
    down = Site(f"{BOND}.down", 0, "down", 12, 16, cuts=(Cut(BOND, 8, 2, of_rows=False),))
    assert [choice.widths for _, choice in exact_schedule(Prior.of(bonded()), (up, down))] == [(6,), (6,)]
    loose = Prior.of(changed({"0.bonds": ..., "0.parameters": 192}))
    with pytest.raises(ValueError, match=f"sites: {BOND}.up and {BOND}.down must have the same width, as {BOND} joins"):
        exact_schedule(loose, (up, down))


def test_a_prior_with_widths_is_shown_and_compared() -> None:
    prior = Prior.of(bonded())
    lines = show_text(prior).splitlines()
    assert lines[3].split() == ["block", "kept", "mlp", "up", "down"]
    assert lines[4].split()[-3:] == ["6/8", "s", "3"]
    assert lines[5].split()[-3:] == ["0.750", "0.750", f"{63 / 192:.3f}"]
    assert "d for dense (0 of 2 sites), or s for smaller without factors (1 sites)" in lines[7]
    assert lines[7].endswith("sensitivity traces: predicted")  # of the bond
    other = Prior.of(changed({"0.bonds.0.width": 4, "0.parameters": 96}))
    text = diff_text(prior, other)
    assert f"{BOND}.up: smaller at width 6 of 8 → smaller at width 4 of 8" in text
    assert "whose relative χ or width changed most" in text


def test_a_site_of_a_prior_describes_what_is_left() -> None:
    up, down = Prior.of(bonded()).sites
    assert isinstance(up, PriorSite)
    assert (up.left, down.left) == ((12, 12), (12, 12))
    assert (up.relative_width, up.relative_chi) == (0.75, 1.0)
    assert (down.relative_width, down.relative_chi) == (0.75, 0.25)
    assert (up.largest_chi, down.largest_chi) == (0, 11)
    assert (up.stored, down.stored) == (144, 3 * (12 + 12 - 3))


def test_version_2_still_loads_and_is_written_as_version_5(tmp_path: Path) -> None:
    fixture = Path(__file__).parents[2] / "fixtures" / "run-1f2ef24" / "prior.json"
    old = json.loads(fixture.read_text())
    assert old["version"] == 2
    new = json.loads(Prior.read(fixture).to_json())
    assert new == json.loads(json.dumps(old | {"version": 5}))
    assert Prior.read(written(tmp_path, new)) == Prior.read(fixture)
    with pytest.raises(ValueError, match="version must be at most 5"):
        Prior.read(written(tmp_path, new | {"version": 6}))
