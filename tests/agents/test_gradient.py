"""The gradient agent: prices follow slopes, and stand still where measured and predicted gains agree."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from toy_search import REWARD, problem, search

from agents import AgentContext, Gradient
from agents.gradient import GradientSettings
from envs import ToyEvaluator, best_by_exhaustion


def test_a_first_proposal_is_the_closed_form_with_slopes() -> None:
    task = problem()
    (first,) = Gradient(task, AgentContext(0, 8)).ask(3)
    assert first.schedule == task.closed_form()
    assert first.probe == task.probe(first.schedule)
    assert first.cost == 4
    assert task.kept(task.probe(first.schedule)) > task.kept(first.schedule)


@pytest.mark.slow
def test_most_of_what_is_to_be_gained_on_three_blocks_is_gained() -> None:
    task = problem()
    evaluate = ToyEvaluator(task.menu)
    _, optimum = best_by_exhaustion(problem(), evaluate, REWARD)
    told = search(Gradient(task, AgentContext(0, 120)), evaluate)
    closed, best = told[0][1], max(reward for _, reward in told)
    assert closed < optimum
    assert best > closed + 0.7 * (optimum - closed)


@pytest.mark.parametrize("granularity", ["block", "block+family"])
def test_blocks_that_matter_more_than_predicted_get_more(granularity: str) -> None:
    task = problem(8, 0.6, granularity)
    evaluate = ToyEvaluator(task.menu, weights=(3.0, 0.5, 1.0, 1.0), interaction=0.0)
    agent = Gradient(task, AgentContext(0, 80))
    told = search(agent, evaluate)
    assert told[0][1] < max(reward for _, reward in told)
    theta = agent._theta
    assert theta[0] > theta[2] > theta[1]
    # Without interactions the weights themselves are the answer.
    assert theta[0] - theta[1] == pytest.approx(math.log(6), abs=0.7)


def test_sites_depart_from_what_their_step_says() -> None:
    # A step a family: what blocks are worth is not for θ to say.
    task = problem(8, 0.6, "family")
    evaluate = ToyEvaluator(task.menu, weights=(3.0, 0.5, 1.0, 1.0), interaction=0.0)
    agent = Gradient(task, AgentContext(0, 160))
    told = search(agent, evaluate)
    delta = agent.residuals.reshape(8, 2).mean(axis=1)
    assert delta[0] > delta[2] > delta[1]
    assert delta[0] - delta[1] == pytest.approx(math.log(6), abs=0.7)
    assert max(reward for _, reward in told) > 0.95 * told[0][1]  # rewards are negative


def test_what_one_pass_says_and_the_next_contradicts_moves_no_site() -> None:
    def departure(noise: float, spread: float) -> float:
        task = problem(8, 0.6, "family")
        agent, generator = (
            Gradient(task, AgentContext(0, 120), GradientSettings(spread=spread)),
            np.random.default_rng(0),
        )
        while proposals := agent.ask(1):
            (proposal,) = proposals
            if proposal.probe is not None:
                exact = ToyEvaluator(task.menu, (1.0,), 0.0).slopes(proposal.schedule, proposal.probe)
                factors = np.exp(noise * generator.standard_normal(len(exact)))
                agent.tell_slopes(
                    proposal,
                    {name: slope * factor for (name, slope), factor in zip(exact.items(), factors, strict=True)},
                )
            agent.tell([proposal], [0.0])
        return float(agent._delta.std())

    assert departure(0.0, spread=10.0) < 0.02
    assert departure(1.0, spread=0.1) < 0.6 * departure(1.0, spread=10.0)


def test_where_predictions_are_right_nothing_moves() -> None:
    task = problem(6, 0.6)
    evaluate = ToyEvaluator(task.menu, weights=(1.0,), interaction=0.0)
    agent = Gradient(task, AgentContext(0, 40))
    told = search(agent, evaluate)
    assert np.abs(agent._theta).max() < 0.05
    assert told[-1][1] == pytest.approx(told[0][1], rel=0.02)


@pytest.mark.parametrize("slopes", [{}, {"blocks.0.attention": math.nan}])
def test_a_failed_backward_pass_teaches_nothing(slopes: Mapping[str, float]) -> None:
    task = problem()
    agent = Gradient(task, AgentContext(0, 40, shards=3))
    (first,) = agent.ask(1)
    agent.tell_slopes(first, slopes)
    agent.tell([first], [math.nan])
    (second,) = agent.ask(1)
    assert second.schedule == first.schedule
    assert second.repeat != first.repeat


def test_a_budget_that_does_not_pay_for_slopes_is_spent_on_scores() -> None:
    task = problem()
    told = search(Gradient(task, AgentContext(0, 6, shards=6)), ToyEvaluator(task.menu))
    assert [proposal.cost for proposal, _ in told] == [4, 1, 1]


def test_what_is_recommended_is_different_and_meets_the_target() -> None:
    task = problem(8, 0.6)
    agent = Gradient(task, AgentContext(0, 60))
    assert agent.recommend(3) == []
    search(agent, ToyEvaluator(task.menu))
    found = agent.recommend(5)
    assert 2 <= len(found) <= 5
    assert len({proposal.schedule.digest for proposal in found}) == len(found)
    assert all(task.kept(proposal.schedule) <= 0.6 for proposal in found)


def test_gains_are_what_the_menu_predicts_when_slopes_are() -> None:
    task = problem()
    schedule = task.closed_form()
    probe = task.probe(schedule)
    exact = ToyEvaluator(task.menu, weights=(1.0,), interaction=0.0).slopes(schedule, probe)
    measured, predicted = task.gains(schedule, probe, exact)
    np.testing.assert_allclose(measured, predicted, rtol=1e-6, atol=1e-9)
    assert (predicted >= 0).all()


def test_offsets_that_are_not_one_number_a_step_are_refused() -> None:
    task = problem()
    assert task.weighted(np.zeros(3)) == task.closed_form()
    for offsets in (np.zeros(2), np.array([0.0, math.nan, 0.0])):
        with pytest.raises(ValueError, match="offsets must be 3 finite numbers"):
            task.weighted(offsets)
    with pytest.raises(ValueError, match="residuals must be 6 finite numbers"):
        task.weighted(np.zeros(3), np.zeros(3))
