import math

import numpy as np
import pytest
import torch

from agents import AgentContext
from agents.ppo import Ppo, PpoMasked, PpoSettings
from envs import Problem, Reward, ToyEvaluator, toy_menu

PLAIN = Reward(compression_weight=0.0, correct_weight=0.0)  # −KL
WEIGHTS = (1.6, 0.7, 1.0, 0.5, 1.3, 0.9, 2.0)
BOTH = pytest.mark.parametrize("agent_of", [Ppo, PpoMasked])
QUICK = PpoSettings(rounds=2, imagined=32, epochs=5)


def problem(blocks=3, target=0.5, granularity="block"):
    return Problem.build(toy_menu(blocks), target, granularity)


def search(agent, evaluate, spoil=lambda number, value: value, sloped=True):
    """Runs an agent to the end of its budget; returns the rewards, and leaves the cost of its proposals in `spent`."""
    values, agent.spent = [], 0
    while proposals := agent.ask(8):
        new = [PLAIN(score) for score in evaluate([proposal.schedule for proposal in proposals])]
        new = [spoil(len(values) + number, value) for number, value in enumerate(new)]
        for proposal in proposals:
            agent.spent += proposal.cost
            if proposal.probe is not None:
                slopes = evaluate.slopes(proposal.schedule, proposal.probe)
                agent.tell_slopes(proposal, slopes if sloped else {})
        agent.tell(proposals, new)
        values += new
    return values


@BOTH
def test_the_first_proposal_is_the_closed_form_with_slopes(agent_of):
    task = problem(10)
    (first, *_) = agent_of(task, AgentContext(0, 20)).ask(5)
    assert first.schedule == task.closed_form()
    assert first.probe == task.probe(first.schedule)


@pytest.mark.slow
@BOTH
def test_ten_blocks_end_far_below_the_closed_form(agent_of):
    task = problem(10, 0.6)
    evaluate = ToyEvaluator(task.menu, WEIGHTS, 0.1)
    agent = agent_of(task, AgentContext(0, 80), QUICK)
    values = search(agent, evaluate)
    assert agent.spent == 80
    assert -max(values) < 0.85 * -values[0]
    # The policy itself moved there, not only what it tried.
    [score] = evaluate([agent.recommend(1)[0].schedule])
    assert score.kl < 0.9 * -values[0]


@pytest.mark.parametrize("failure", [math.nan, -math.inf, -30.0])
def test_failed_trials_do_not_hide_the_others(failure):
    task = problem(10, 0.6)
    agent = Ppo(task, AgentContext(0, 60), QUICK)
    evaluate = ToyEvaluator(task.menu, WEIGHTS, 0.1)
    values = search(agent, evaluate, lambda number, value: failure if number % 10 == 5 else value)
    good = [value for value in values if value > -30]
    assert -max(good) < 0.9 * -values[0]
    assert all(np.isfinite(array).all() for array in agent.saved_policy().arrays.values())


@BOTH
def test_the_global_generators_are_left_as_they_were(agent_of):
    def state():
        return torch.random.get_rng_state().tolist(), np.random.get_state()[1].tolist()  # noqa: NPY002

    before = state()
    task = problem()
    search(agent_of(task, AgentContext(5, 24), QUICK), ToyEvaluator(task.menu))
    assert state() == before


def test_the_proposals_do_not_depend_on_the_global_generators():
    task, found = problem(6), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        agent = Ppo(task, AgentContext(0, 30), QUICK)
        found.append(search(agent, ToyEvaluator(task.menu)))
    assert found[0] == found[1]


def test_asking_on_before_telling_is_allowed():
    task = problem(6)
    agent, evaluate = Ppo(task, AgentContext(0, 30), QUICK), ToyEvaluator(task.menu)
    early = [proposal for _ in range(4) for proposal in agent.ask(5)]
    assert len({(proposal.schedule.digest, proposal.repeat) for proposal in early}) == len(early) > 10
    for proposal in reversed(early):
        agent.tell([proposal], [PLAIN(evaluate([proposal.schedule])[0])])
    search(agent, evaluate)
    assert agent.spent == 30 - sum(proposal.cost for proposal in early)


@BOTH
@pytest.mark.parametrize("blocks, granularity", [(1, "block"), (3, "block+family"), (25, "site")])
def test_any_number_of_steps_works(agent_of, blocks, granularity):
    task = problem(blocks, 0.6, granularity)
    agent = agent_of(task, AgentContext(0, 12), QUICK)
    search(agent, ToyEvaluator(task.menu))
    assert agent.spent == 12 or blocks == 1


def test_the_mean_of_late_modes_is_recommended_first_then_modes_and_trials():
    task = problem(6)
    agent = Ppo(task, AgentContext(0, 20), QUICK)
    search(agent, ToyEvaluator(task.menu, WEIGHTS[:6], 0.1))
    found = agent.recommend(5)
    assert len({proposal.schedule.digest for proposal in found}) == 5
    late = np.mean([mode.place for mode in agent._modes[len(agent._modes) // 2 :]], axis=0)
    assert found[0].schedule == task.weighted(np.zeros(6), late)
    residuals = agent.saved_policy().arrays["residuals"]
    around = task.around(np.zeros(task.steps), residuals)
    assert around.schedule(agent.policy.mode.tolist()) in [proposal.schedule for proposal in found[:2]]


def test_modes_that_earn_less_than_the_closed_form_are_not_recommended_first():
    task = problem(6)
    agent = Ppo(task, AgentContext(0, 30), QUICK)
    search(agent, ToyEvaluator(task.menu), lambda number, value: value if number == 0 else -5.0 - number)
    assert agent.recommend(1)[0].schedule == task.closed_form()


def test_learning_keeps_the_policy_in_its_trust_region_and_uses_it():
    task = problem(10, 0.6)
    agent, evaluate = Ppo(task, AgentContext(0, 40), PpoSettings(trust=0.05)), ToyEvaluator(task.menu, WEIGHTS, 0.1)
    moved = []
    while proposals := agent.ask(8):
        for proposal in proposals:
            if proposal.probe is not None:
                agent.tell_slopes(proposal, evaluate.slopes(proposal.schedule, proposal.probe))
            agent.tell([proposal], [PLAIN(evaluate([proposal.schedule])[0])])
        before = agent.policy.arrays
        agent._learn()
        moved.append(agent.policy.retreat(before, agent.policy.sample(64, np.random.default_rng(0)), math.inf))
    assert 0.03 < max(moved) < 0.075  # measured in other episodes


def test_slopes_move_single_sites_besides_the_steps_and_only_slopes_do():
    task = problem(10, 0.6)
    evaluate = ToyEvaluator(task.menu, WEIGHTS, 0.1)
    for sloped in (True, False):
        agent = Ppo(task, AgentContext(0, 40), QUICK)
        search(agent, evaluate, sloped=sloped)
        residuals = agent.saved_policy().arrays["residuals"]
        assert residuals.any() == sloped
        assert task.membership.T @ residuals == pytest.approx(0, abs=1e-9)


def test_slopes_that_never_come_are_asked_for_no_longer():
    task = problem(6)
    agent = Ppo(task, AgentContext(0, 60, shards=4), QUICK)
    values = search(agent, ToyEvaluator(task.menu), sloped=False)
    assert agent.spent == 60
    assert len(values) == 60 - 2 * 3  # two looks with slopes cost three more than looks without


def test_a_policy_goes_on_with_its_residuals():
    task = problem(10, 0.6)
    agent = Ppo(task, AgentContext(0, 40), QUICK)
    search(agent, ToyEvaluator(task.menu, WEIGHTS, 0.1))
    saved = agent.saved_policy()
    later = Ppo(task, AgentContext(1, 10, policy=saved), QUICK)
    assert later.recommend(1) == []
    assert later.saved_policy().arrays["residuals"] == pytest.approx(saved.arrays["residuals"])
    assert later.ask(1)[0].schedule == agent.recommend(2)[1].schedule
