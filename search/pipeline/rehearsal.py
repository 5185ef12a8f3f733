"""Rehearses the end of a run at its start: what is written and read at the end is made once before any work.

A name, a licence or a tokenizer that the last step would refuse is thereby refused first, by the same code. Knows what
a run writes; each part is implemented in a module of its own.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

from compression.allocation.menu import Menu, Option, SiteMenu, dense_menu, envelope
from compression.bonds import one_of_a_kind
from compression.refusal import Refusal
from compression.schedule import Joint, Schedule
from compression.sites import Site, Unit, first_of_kind, members, units
from compression.size import Price
from envs import Problem
from search.benchmarking.documents import always_searched, check_remaining
from search.benchmarking.tasks import named_tasks
from search.config import Config
from search.experiment.experiment import Experiment
from search.export.deci import check_deci
from search.export.folder import check_export
from search.export.model_card import model_card
from search.healing.teacher import output_head
from search.model.budget import smallest
from search.pipeline.finish import TASKS
from search.priors.build import build_prior
from search.priors.format import Prior, Sensitivity
from search.trials.setup import make_agent
from search.trials.starting_point import StartingPoint

__all__ = ["rehearse", "rehearse_prior"]

_TRACE = 9  # χ in the trace of a site
_LONG = math.pi * 1e-100  # a number of as many characters as any


def rehearse(experiment: Experiment, start: StartingPoint) -> None:
    """Check that a run of `experiment` can be finished: its agent, prior, healing, benchmarks and exported folder.

    Raises:
        ValueError: one of them would be refused later; one line.
        DataUnavailable: the items of a benchmark cannot be had.
    """
    config, loaded = experiment.config, experiment.loaded
    if start.policy is not None:
        problem = Problem.build(_menu(experiment), experiment.budget.target_kept, config.granularity)
        make_agent(config, problem, experiment, start)  # refuses a policy of other steps
    prior = rehearse_prior(experiment)
    if config.heal_minutes:
        with one_of_a_kind(loaded.model, *first_of_kind(loaded.model)) if loaded.is_outline else nullcontext():
            output_head(loaded.model)
    if config.export != "none":
        check_export(config.export, loaded.model, loaded.tokenizer)
        if config.export == "plain":  # a search leaves other widths in each block
            check_deci(loaded.model)
        model_card(config.export, config.export, prior.model_dump(mode="json"), {}, "searched", "", [])
    if config.benchmark_items and not loaded.kind.is_encoder:
        searched = always_searched().union(prior.data.search_items)
        for task in named_tasks(TASKS):
            check_remaining(task, searched)


def rehearse_prior(experiment: Experiment) -> Prior:
    """Return a prior of the model, read as a file is read, that is as large as that of any run but for its table.

    Every matrix that may be compressed has χ = 1 and a long trace, and every bond its least width.

    Raises:
        ValueError: the prior would be refused; one line that names the field and the value.
    """
    schedule = Schedule(tuple(pair for options in _menu(experiment).sites for pair in options.assigned(0)))
    trace = Sensitivity(
        source="predicted", chi=tuple(range(10**6, 10**6 + _TRACE)), kl=tuple(_LONG for _ in range(_TRACE))
    )
    traces = {name: trace for name, choice in schedule if not choice.is_dense}
    try:
        prior = build_prior(
            experiment.config, experiment.loaded, _menu(experiment), schedule, [], experiment.splits, traces
        )
        return Prior.parse(prior.to_json())
    except Refusal as error:
        raise Refusal(
            f"the prior of this run would be refused: {error}; if a field of the model is named, rename its folder or "
            "correct its files"
        ) from None


def _menu(experiment: Experiment) -> Menu:
    """A menu of one small option and dense for every site and unit, with costs that mean nothing."""
    chosen = units(experiment.sites) if experiment.config.form != "factors" else experiment.sites
    return Menu(tuple(_options(unit, experiment.config, experiment.budget.price) for unit in chosen))


def _options(unit: Site | Unit, config: Config, price: Price) -> SiteMenu:
    """The menu of the smallest option of a unit or site, and dense."""
    small = tuple(smallest(site, config) for site in members(unit))
    if isinstance(unit, Unit):
        return envelope(unit, [Option(Joint(small), 1.0)], price)
    return dense_menu(unit, price) if small[0].is_dense else envelope(unit, [Option(small[0], 1.0)], price)
