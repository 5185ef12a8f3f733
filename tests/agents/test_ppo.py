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


def probabilities(agent, task, prefix):
    """Of the levels at the step after `prefix`."""
    seen = np.concatenate([task.observation(prefix), np.eye(task.steps, dtype=np.float32)[len(prefix)]])[None]
    masks = (task.mask(prefix)[None],) if agent.masked else ()
    return agent._model.policy.get_distribution(torch.from_numpy(seen), *masks).distribution.probs[0].detach().numpy()


@BOTH
def test_the_policy_starts_as_a_ladder_around_the_closed_form_with_dense_rare(agent_of):
    task = problem(10)
    agent = agent_of(task, AgentContext(0, 20))
    found = probabilities(agent, task, ())
    expected = np.exp(-(task.offsets[:-1] ** 2) / (2 * 0.3**2))
    dense = 0.1 / 10
    assert found[:-1] == pytest.approx((1 - dense) * expected / expected.sum(), abs=1e-5)
    assert found[-1] == pytest.approx(dense, rel=1e-4)
    (first, *_) = agent.ask(5)
    assert first.schedule == task.closed_form()
    assert first.probe == task.probe(first.schedule)


def test_samples_follow_the_probabilities_and_only_masks_forbid_dense():
    task = problem(target=0.4)
    for agent_of in (Ppo, PpoMasked):
        agent = agent_of(task, AgentContext(0, 20))
        with torch.no_grad():
            agent._model.policy.action_net.linear.bias[2] = 3.0  # dense nearly always, where it is allowed
        rollout = agent._sample(2000)
        first = np.bincount(rollout.chosen[0], minlength=task.levels) / 2000
        assert first == pytest.approx(probabilities(agent, task, ()), abs=0.02)
        chosen = rollout.chosen == task.levels - 1
        illegal = chosen & ~rollout.masks[:, :, -1]
        assert illegal.any() == (not agent.masked)
        for levels in rollout.taken[:50].tolist():
            assert all(task.mask(levels[:step])[level] for step, level in enumerate(levels))
        assert (rollout.taken.T[illegal] == task.levels - 2).all()


def test_the_reward_comes_last_and_the_advantages_are_those_of_the_value_network():
    task = problem(5, 0.6)
    agent = Ppo(task, AgentContext(0, 20), PpoSettings(gae_lambda=0.9))
    rollout = agent._sample(6)
    agent._model.train = lambda: None
    returns = np.arange(6.0)
    agent._train(rollout, returns)
    buffer = agent._model.rollout_buffer
    standardised = (returns - returns.mean()) / returns.std()
    assert (buffer.rewards[:-1] == 0).all()
    assert buffer.rewards[-1] == pytest.approx(standardised)
    for episode in range(6):
        advantage = 0.0
        for step in reversed(range(task.steps)):
            later = buffer.values[step + 1, episode] if step < task.steps - 1 else standardised[episode]
            advantage = later - buffer.values[step, episode] + 0.9 * advantage
            assert buffer.advantages[step, episode] == pytest.approx(advantage, abs=1e-5)


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


def test_the_mode_is_recommended_first_and_then_episodes_of_trials():
    task = problem(6)
    agent = Ppo(task, AgentContext(0, 20), QUICK)
    search(agent, ToyEvaluator(task.menu))
    found = agent.recommend(5)
    assert len({proposal.schedule.digest for proposal in found}) == 5
    residuals = agent.saved_policy().arrays["residuals"]
    around = task.around(np.zeros(task.steps), residuals)
    assert found[0].schedule == around.schedule(agent.mode().tolist())
    tried = {around.schedule(levels).digest for levels in agent.trials[0].tolist()}
    assert {proposal.schedule.digest for proposal in found[1:]} <= tried


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
    assert later.ask(1)[0].schedule == agent.recommend(1)[0].schedule
