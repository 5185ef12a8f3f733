"""REINFORCE: its gradient is unbiased whatever the critic believes, and its search gets far with few evaluations."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from toy_search import REWARD, problem, search

from agents import AgentContext, Gradient, Reinforce
from agents.reinforce import Policy, policy_gradient, shrunk
from agents.slope_critic import SlopeCritic
from envs import Problem, ToyEvaluator, toy_menu

WEIGHTS = (1.6, 0.7, 1.0, 0.5, 1.3, 0.9, 2.0)


def kl(task: Problem, evaluate: ToyEvaluator, agent: Reinforce | Gradient) -> float:
    return evaluate([agent.recommend(1)[0].schedule])[0].kl


def policy_at_random(count: int, seed: int = 0) -> Policy:
    generator = np.random.default_rng(seed)
    root = generator.normal(0, 0.2, (count, count))
    return Policy(generator.normal(0, 0.2, count), root @ root.T + 0.05 * np.eye(count))


def test_the_score_is_the_gradient_of_the_log_probability() -> None:
    policy = policy_at_random(4)
    action = np.random.default_rng(1).normal(0, 0.5, 4)

    def log_density(mean: np.ndarray) -> float:
        return float(-0.5 * (action - mean) @ np.linalg.inv(policy.covariance) @ (action - mean))

    nudges = 1e-5 * np.eye(4)
    slopes = [(log_density(policy.mean + n) - log_density(policy.mean - n)) / 2e-5 for n in nudges]
    np.testing.assert_allclose(policy.score(action[None])[0], slopes, rtol=1e-5)


def test_samples_follow_the_policy_and_come_in_mirrored_pairs() -> None:
    policy = policy_at_random(3)
    actions = policy.sample(20_000, np.random.default_rng(0))
    np.testing.assert_allclose(actions[::2] + actions[1::2], np.broadcast_to(2 * policy.mean, (20_000, 3)))
    np.testing.assert_allclose(np.cov(actions.T), policy.covariance, atol=0.02)


@pytest.mark.parametrize("belief", [1.0, 1.6])
def test_the_policy_gradient_is_exact_in_the_mean_whatever_the_critic_believes(belief: float) -> None:
    # Two sites: schedules depend on the difference of their log weights only, so the exact gradient is an integral.
    task = problem(1)
    evaluate = ToyEvaluator(task.menu, weights=(1.0,), interaction=0.0)
    true = ToyEvaluator(task.menu, weights=(2.0,))
    grid = np.linspace(-4, 4, 401)
    places = np.stack([grid / 2, -grid / 2], axis=1)
    rewards = np.array([REWARD(score) for score in true([task.weighted(np.zeros(1), place) for place in places])])
    critic = SlopeCritic(task, 1)
    schedule = task.closed_form()
    probe = task.probe(schedule)
    measured, predicted = task.gains(schedule, probe, evaluate.slopes(schedule, probe))
    critic.add_slopes(0, task.costs(schedule), task.costs(probe), measured * np.array([belief, 1.0]), predicted)
    critic.fit(np.zeros(2))

    policy = Policy(np.array([0.2, -0.1]), np.array([[0.09, 0.02], [0.02, 0.16]]))
    spread = float(np.array([1, -1]) @ policy.covariance @ np.array([1, -1]))
    away = grid - 0.3
    weights = np.exp(-0.5 * away**2 / spread)
    along = float((weights * rewards * away).sum() / weights.sum() / spread)
    exact = np.array([along, -along])

    generator, count = np.random.default_rng(0), 16_000
    actions = policy.sample(count, generator)
    found = np.interp(actions[:, 0] - actions[:, 1], grid, rewards)
    real, imagined = policy_gradient(policy, critic, policy.sample(count, generator), actions, found)
    error = real.std(axis=0) / math.sqrt(count)
    assert (error < 0.35 * np.abs(exact)).all()
    assert (np.abs(real.mean(axis=0) + imagined - exact) < 4 * error + 0.02 * np.abs(exact)).all()
    # Each term alone is far off where the critic is.
    if belief != 1.0:
        assert np.abs(imagined - exact).max() > 4 * error.max()


def test_the_first_proposal_is_the_closed_form_with_slopes() -> None:
    task = problem(granularity="block+family")
    (first,) = Reinforce(task, AgentContext(3, 20)).ask(5)
    assert first.schedule == task.closed_form()
    assert first.probe == task.probe(first.schedule)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("granularity", ["block", "block+family"])
def test_twenty_blocks_end_far_below_the_closed_form(granularity: str, seed: int) -> None:
    task = problem(20, 0.6, granularity)
    evaluate = ToyEvaluator(task.menu, WEIGHTS, 0.1)
    closed = evaluate([task.closed_form()])[0].kl
    agent = Reinforce(task, AgentContext(seed, 60))
    assert sum(proposal.cost for proposal, _ in search(agent, evaluate)) == 60
    assert kl(task, evaluate, agent) < 0.75 * closed


def test_sites_that_matter_more_than_predicted_get_more() -> None:
    task = problem(8, 0.6)
    evaluate = ToyEvaluator(task.menu, weights=(3.0, 0.5, 1.0, 1.0), interaction=0.0)
    agent = Reinforce(task, AgentContext(0, 40))
    search(agent, evaluate)
    mean = agent.policy.mean.reshape(8, 2).mean(axis=1)
    assert mean[0] > mean[2] > mean[1]


def test_rewards_alone_move_the_policy_where_no_slopes_arrive() -> None:
    task = problem(6, 0.6)
    evaluate = ToyEvaluator(task.menu, (3.0, 0.5, 1.0), 0.0)
    agent = Reinforce(task, AgentContext(0, 60))
    while proposals := agent.ask(8):
        agent.tell(proposals, [REWARD(score) for score in evaluate([one.schedule for one in proposals])])
    assert agent.critic.passes == 0
    assert agent.recommend(1)[0].schedule != task.closed_form()
    assert kl(task, evaluate, agent) < evaluate([task.closed_form()])[0].kl


@pytest.mark.parametrize("slopes", [{}, {"blocks.0.attention": math.nan}])
def test_a_failed_backward_pass_teaches_nothing(slopes: dict[str, float]) -> None:
    task = problem()
    agent = Reinforce(task, AgentContext(0, 40, shards=3))
    (first,) = agent.ask(1)
    agent.tell_slopes(first, slopes)
    agent.tell([first], [math.nan])
    assert agent.critic.passes == 0
    (second,) = agent.ask(1)
    assert (second.schedule, second.probe is None) == (first.schedule, False)
    assert second.repeat != first.repeat


def test_a_site_without_slope_counts_as_not_measured() -> None:
    task = problem()
    evaluate = ToyEvaluator(task.menu, interaction=0.0)
    agents = [Reinforce(task, AgentContext(0, 8)) for _ in range(2)]
    for agent, missing in zip(agents, (None, "blocks.1.mlp"), strict=True):
        (first,) = agent.ask(1)
        slopes = evaluate.slopes(first.schedule, first.probe or first.schedule)
        agent.tell_slopes(first, {name: slope for name, slope in slopes.items() if name != missing})
        agent.tell([first], [-0.1])
        agent.recommend(1)
    whole, part = (agent.critic.covariance.diagonal() for agent in agents)
    site = task.sites.index("blocks.1.mlp")
    assert part[site] > 1.05 * whole[site]


def test_a_mirrored_pair_reads_one_shard() -> None:
    task, shards = problem(6, 0.6), 5
    context = AgentContext(0, 60, shards=shards)
    agent, evaluate = Reinforce(task, context), ToyEvaluator(task.menu)
    plain = []
    while proposals := agent.ask(6):
        for one in proposals:
            if one.probe is not None:
                agent.tell_slopes(one, evaluate.slopes(one.schedule, one.probe, one.repeat))
            else:
                plain.append(context.shard(one.schedule, one.repeat))
        agent.tell(proposals, [REWARD(score) for score in evaluate([one.schedule for one in proposals])])
    assert len(plain) > 10
    pairs = list(zip(plain[::2], plain[1::2], strict=False))
    assert np.mean([left == right for left, right in pairs]) > 0.8
    assert len(set(plain)) == shards


def test_what_a_wrong_critic_misses_is_paid_back_and_noise_is_not() -> None:
    # The critic knows nothing, and rewards without noise rise along one direction.
    agent = Reinforce(problem(2), AgentContext(0, 100))
    direction, generator = np.array([1.0, -1.0, 0.5, -0.5]), np.random.default_rng(0)
    actions = agent.policy.sample(200, generator)
    found, none = (
        shrunk(policy_gradient(agent.policy, agent.critic, actions, actions, rewards)[0])
        for rewards in (actions @ direction, generator.standard_normal(400))
    )
    np.testing.assert_allclose(found, direction, atol=0.35)
    assert np.linalg.norm(none) < 0.5 * np.linalg.norm(found)


def test_asking_on_before_telling_is_allowed() -> None:
    task = problem(6)
    agent, evaluate = Reinforce(task, AgentContext(0, 60, shards=6)), ToyEvaluator(task.menu)
    early = [proposal for _ in range(4) for proposal in agent.ask(5)]
    assert len({(one.schedule.digest, one.repeat) for one in early}) == len(early) >= 4
    for proposal in reversed(early):
        if proposal.probe is not None:
            agent.tell_slopes(proposal, evaluate.slopes(proposal.schedule, proposal.probe))
        agent.tell([proposal], [REWARD(evaluate([proposal.schedule])[0])])
    spent = sum(proposal.cost for proposal in early)
    assert sum(proposal.cost for proposal, _ in search(agent, evaluate)) == 60 - spent


def test_a_policy_of_the_earlier_agent_is_refused_by_name() -> None:
    task = problem()
    agent = Reinforce(task, AgentContext(0, 5))
    old = replace(agent.saved_policy(), steps=task.names, arrays={"bias": np.zeros(3)})
    with pytest.raises(ValueError, match=r"learned by an earlier reinforce, .* start from the prior\.json"):
        Reinforce(task, AgentContext(0, 5, policy=old))
    whole = Problem.build(toy_menu(heads=2), 0.5)
    with pytest.raises(ValueError, match=r"its array covariance is \(6, 6\), this agent needs \(15, 15\)"):
        Reinforce(whole, AgentContext(0, 5, policy=agent.saved_policy()))
