import numpy as np
import pytest

from agents import AgentContext, Bandit, RandomSearch
from envs import Problem, Reward, ToyEvaluator, toy_menu

PLAIN = Reward(compression_weight=0.0, correct_weight=0.0)  # −KL
WEIGHTS = (1.6, 0.7, 1.0, 0.5, 1.3, 0.9, 2.0)


def problem(blocks=5, target=0.6, granularity="block"):
    return Problem.build(toy_menu(blocks), target, granularity)


def rewards_of(task, actions):
    evaluate = ToyEvaluator(task.menu, WEIGHTS, 0.1)
    return np.array([PLAIN(evaluate([task.schedule(row)])[0]) for row in actions])


def fitted(task, count=30, seed=0):
    actions = np.random.default_rng(seed).integers(3, 12, (count, task.steps))
    agent = Bandit(task, AgentContext(seed, 50))
    agent._fit(actions, rewards_of(task, actions))
    return agent, actions


def exact_posterior(agent, actions):
    """Mean and covariance of (a, b, e) by the textbook, from the matrix of features."""
    task = agent._problem
    count, levels = len(actions), task.levels
    features = np.zeros((count, 2 + task.steps * levels))
    features[:, 0], features[:, 1] = 1.0, agent._total
    for step in range(task.steps):
        features[np.arange(count), 2 + step * levels + actions[:, step]] = 1.0
    prior = np.zeros((features.shape[1],) * 2)
    prior[0, 0], prior[1, 1] = 100, 30 / agent._scale**2
    prior[2:, 2:] = np.kron(np.eye(task.steps), agent._theta * agent._prior)
    gain = prior @ features.T @ np.linalg.inv(features @ prior @ features.T + agent._ridge * np.eye(count))
    return gain @ agent._target, prior - gain @ features @ prior


def test_the_posterior_mean_is_that_of_bayesian_linear_regression():
    agent, actions = fitted(problem())
    mean, _ = exact_posterior(agent, actions)
    slope, effects = agent._posterior(0)
    assert slope[0] == pytest.approx(mean[1], rel=1e-6)
    assert effects[0].ravel() == pytest.approx(mean[2:], abs=1e-7)


def test_draws_have_the_posterior_covariance_times_the_exploration_squared():
    agent, actions = fitted(problem(3))
    mean, covariance = exact_posterior(agent, actions)
    slope, effects = agent._posterior(20000)
    drawn = np.column_stack([slope, effects.reshape(20000, -1)])
    wanted = agent.settings.exploration**2 * covariance[1:, 1:]
    spread = np.sqrt(np.diag(wanted))
    assert np.abs(drawn.mean(axis=0) - mean[1:]).max() < 5 * spread.max() / np.sqrt(20000)
    assert np.abs(np.cov(drawn.T) - wanted).max() < 0.05 * np.diag(wanted).max()


def test_the_effect_of_the_middle_level_is_nothing_and_neighbours_learn_from_each_other():
    agent, _ = fitted(problem())
    _, effects = agent._posterior(4)
    middle = agent._problem.middle
    assert np.abs(effects[:, :, middle]).max() < 1e-6
    near, far = agent._prior[middle + 4, middle + 5], agent._prior[middle + 4, middle - 4]
    assert near > 0 > far


def test_it_learns_which_blocks_matter():
    task = problem(8)
    actions = np.random.default_rng(1).integers(3, 12, (120, 8))
    rewards = rewards_of(task, actions)
    agent = Bandit(task, AgentContext(0, 50))
    agent._fit(actions[:80], rewards[:80])
    predicted = agent._values(actions[80:], *agent._posterior(0)) * agent._spread
    assert np.corrcoef(predicted, rewards[80:])[0, 1] > 0.9


def test_the_best_episode_under_a_draw_has_no_better_neighbour_one_level_off():
    agent, _ = fitted(problem(6))
    slope, effects = agent._posterior(0)
    best = agent._best(slope, effects, sweeps=6)
    own = agent._values(best, slope, effects)
    for step in range(6):
        near = np.tile(best, (agent._problem.levels - 1, 1))
        near[:, step] = np.arange(agent._problem.levels - 1)
        assert agent._values(near, slope, effects).max() <= own[0] + 1e-9


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow
def test_twenty_blocks_end_far_below_the_closed_form_and_random_search(seed):
    task = problem(20, granularity="block+family")
    values = {}
    for kind in (Bandit, RandomSearch):
        agent, values[kind] = kind(task, AgentContext(seed, 100)), []
        while proposals := agent.ask(8):
            rewards = rewards_of(task, [proposal.actions for proposal in proposals]).tolist()
            agent.tell(proposals, rewards)
            values[kind] += rewards
        if kind is Bandit:
            assert rewards_of(task, [agent.recommend(1)[0].actions])[0] > 0.85 * values[kind][0]
    assert -max(values[Bandit]) < 0.85 * -values[Bandit][0]
    assert max(values[Bandit]) > max(values[RandomSearch])


def test_the_first_proposal_is_the_closed_form():
    task = problem(granularity="block+family")
    assert Bandit(task, AgentContext(3, 20)).ask(5)[0].schedule == task.closed_form()
