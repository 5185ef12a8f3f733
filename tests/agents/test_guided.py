"""The guided agent: slopes first, then a search around what they say."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from agents import AgentContext, Guided, GuidedSettings, Proposal, make
from envs import Problem, Reward, ToyEvaluator, toy_menu

REWARD = Reward(compression_weight=0.0, correct_weight=0.0)


def problem(blocks: int = 8) -> Problem:
    return Problem.build(toy_menu(blocks), 0.6)


def search(agent: Guided, evaluate: ToyEvaluator, count: int = 7) -> list[tuple[Proposal, float]]:
    told = []
    while proposals := agent.ask(count):
        rewards = [REWARD(score) for score in evaluate([proposal.schedule for proposal in proposals])]
        for proposal in proposals:
            if proposal.probe is not None:
                agent.tell_slopes(proposal, evaluate.slopes(proposal.schedule, proposal.probe))
        agent.tell(proposals, rewards)
        told += zip(proposals, rewards, strict=True)
    return told


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("follower", ["reinforce", "evolution", "random", "bandit"])
def test_the_budget_is_spent_on_slopes_first_and_no_look_comes_twice(follower: str, shards: int) -> None:
    task = problem()
    settings = GuidedSettings(follower=partial(make, follower))
    told = search(Guided(task, AgentContext(0, 60, shards), settings), ToyEvaluator(task.menu))
    costs = [proposal.cost for proposal, _ in told]
    assert sum(costs) == 60
    assert costs[0] == 4
    assert costs == sorted(costs, reverse=True)
    assert len({(proposal.schedule.digest, proposal.repeat) for proposal, _ in told}) == len(told)


def test_the_follower_starts_where_the_gradient_agent_ended() -> None:
    task = problem()
    agent = Guided(task, AgentContext(0, 60))
    told = search(agent, ToyEvaluator(task.menu, weights=(3.0, 0.5, 1.0)))
    assert agent._follower is not None
    outcome = agent._lead.offsets, agent._lead.residuals
    around = task.around(*outcome)
    assert around.closed_form() == task.weighted(*outcome) != task.closed_form()
    assert around.closed_form() in [proposal.schedule for proposal, _ in told]
    assert all(proposal.actions is None for proposal, _ in told)


@pytest.mark.slow
def test_it_ends_above_both_its_parts_on_a_task_with_interactions() -> None:
    task = problem(12)
    evaluate = ToyEvaluator(task.menu, weights=(3.0, 0.5, 1.0), interaction=0.4)
    told = search(Guided(task, AgentContext(0, 120), GuidedSettings(lead=0.16)), evaluate)
    lead = [reward for proposal, reward in told if proposal.cost == 4]
    assert lead[0] < max(lead) < max(reward for _, reward in told)


def test_recommendations_are_different_and_hold_what_the_lead_believes() -> None:
    task = problem()
    agent = Guided(task, AgentContext(0, 60))
    assert agent.recommend(3) == []
    search(agent, ToyEvaluator(task.menu))
    found = [proposal.schedule.digest for proposal in agent.recommend(6)]
    assert len(set(found)) == len(found) == 6
    assert agent._lead.recommend(1)[0].schedule.digest in found


def test_a_task_around_offsets_forecasts_what_it_allocates() -> None:
    task = problem()
    offsets = np.linspace(-1, 1, task.steps)
    around = task.around(offsets)
    middle = np.full((1, task.steps), task.middle)
    indices = [site.choices.index(around.closed_form()[site.site.name]) for site in task.menu.sites]
    assert around.forecast(middle).sum() == pytest.approx(task.menu.cost(np.array(indices)), rel=0.1)
    assert [around.share(step, task.middle) for step in (0, 7)] != [task.share(step, task.middle) for step in (0, 7)]
    assert around.around(-offsets).closed_form() == task.closed_form()
