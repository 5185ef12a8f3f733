"""Observations with what slopes have taught."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

import envs  # noqa: F401 - registers the environment
from agents.critic_features import CriticFeatures
from envs import Problem, ToyEvaluator, toy_menu


def made(one_shot: bool = False, weights: tuple[float, ...] = (3.0, 0.5, 1.0)) -> CriticFeatures:
    menu = toy_menu(3)
    evaluate = ToyEvaluator(menu, weights, 0.0)
    problem = Problem.build(menu, target_kept=0.5)
    how = {"problem": problem, "evaluate": evaluate, "one_shot": one_shot, "slopes": evaluate.slopes}
    return CriticFeatures(gym.make("chisel/BondDimension-v0", **how))


@pytest.mark.parametrize("one_shot", [False, True])
def test_observations_lie_in_the_space_of_the_wrapped_environment(one_shot: bool) -> None:
    env = made(one_shot)
    assert env.observation_space.shape == (12 + 2 * 3,)
    env.action_space.seed(0)
    for _ in range(3):
        observation, _ = env.reset()
        done = False
        while not done:
            assert env.observation_space.contains(observation)
            observation, _, done, *_ = env.step(env.action_space.sample())
        assert env.observation_space.contains(observation)


def test_one_episode_teaches_which_groups_matter_and_leaves_the_rest_as_it_was() -> None:
    env = made(one_shot=True)
    before, _ = env.reset()
    after, _, done, _, info = env.step(np.full(3, env.problem.middle))
    assert done
    assert set(info["slopes"]) <= set(env.problem.sites)
    (first, price, doubt), (_, prices, doubts) = (np.split(seen, [12, 15]) for seen in (before, after))
    assert price == pytest.approx(0, abs=1e-6)
    assert prices[0] > prices[2] > prices[1]
    assert (doubts < doubt).all()
    assert np.array_equal(env.reset()[0][:12], first)
    assert np.array_equal(env.reset()[0][12:15], prices)


def test_an_environment_without_slopes_is_refused() -> None:
    with pytest.raises(ValueError, match="need a BondDimensionEnv that was made with slopes"):
        CriticFeatures(gym.make("chisel/BondDimension-v0"))
