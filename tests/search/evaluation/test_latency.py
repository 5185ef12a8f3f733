"""Time of the sites under a schedule, from the planner's shares."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.zoo_models import make_model
from compression import DENSE, Choice, Planner, Schedule, Site
from compression.allocation.menu import SiteMenu
from search.evaluation.latency import decode, prefill
from search.evaluation.site_times import SiteTimes
from search.model.loading import load_model

SITES = (Site("a", 0, "q", 64, 64), Site("b", 0, "down", 64, 192))


class HalfAsLong(Planner):
    """Every compressed layer takes χ/64 of the dense time for one token, half of that for a prompt."""

    def share(self, legs: object, chi: int, dtype: object, device: object, tokens: int) -> float:
        return chi / 64 / (1 if tokens == 1 else 2)


def times() -> SiteTimes:
    return SiteTimes(SITES, HalfAsLong("memory"), torch.float32, torch.device("cpu"))


def test_a_dense_schedule_takes_all_the_time() -> None:
    assert times()(Schedule.dense(("a", "b"))) == 1


def test_sites_weigh_by_their_parameters_and_prompts_as_much_as_single_tokens() -> None:
    schedule = Schedule((("a", Choice("pivoted-lowrank", 16, "two-sided")), ("b", DENSE)))
    one, prompt = (0.25 * 1 + 3) / 4, (0.125 * 1 + 3) / 4
    assert times()(schedule) == pytest.approx((one + prompt) / 2)


def test_the_machine_is_asked_when_nothing_is_known() -> None:
    schedule = Schedule(tuple((site.name, Choice("pivoted-lowrank", 8, "two-sided")) for site in SITES))
    fraction = SiteTimes(SITES, Planner("memory"), torch.float32, torch.device("cpu"))(schedule)
    assert 0.01 < fraction < 100


def test_the_shares_of_all_sites_add_up_to_the_fraction() -> None:
    choices = (Choice("pivoted-lowrank", 8, "two-sided"), Choice("pivoted-lowrank", 16, "two-sided"), DENSE)
    figures = np.arange(3), np.array([2.0, 1.0, 0.0]), np.arange(3)
    shares = [times().shares(SiteMenu(site, choices, *figures)) for site in SITES]
    for place, choice in enumerate(choices):
        schedule = Schedule(tuple((site.name, choice) for site in SITES))
        assert sum(each[place] for each in shares) == pytest.approx(times()(schedule))


@pytest.mark.parametrize(("seconds", "rounds"), [(60.0, 3), (0.0, 1)])
def test_no_round_begins_once_the_time_is_up_but_one_is_always_measured(seconds: float, rounds: int) -> None:
    model = load_model("random:tiny-llama", "cpu").model
    found = prefill(model, {"dense": {}, "same": {}}, 8, 3, torch.device("cpu"), seconds=seconds)
    assert [len(times) for times in found.values()] == [rounds, rounds]


@pytest.mark.parametrize("name", ["llama", "mamba", "mamba2", "falcon_mamba"])
def test_tokens_are_timed_whatever_a_model_calls_what_it_has_read(name: str) -> None:
    model, read = make_model(name), []
    model.register_forward_pre_hook(lambda _, args, named: read.append(named), with_kwargs=True)
    times = decode(model, {"dense": {}}, 2, torch.device("cpu"))
    assert len(times["dense"]) == 2
    assert all(np.array(times["dense"]) > 0)
    assert all({"past_key_values", "cache_params"} & named.keys() for named in read[1:])
