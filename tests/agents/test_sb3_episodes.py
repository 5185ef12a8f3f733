"""Episodes in lockstep: the same as one after the other, and ready for stable-baselines3 as it is."""

import numpy as np
import pytest
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO

from agents.sb3_episodes import Episodes
from envs import Problem, Reward, ToyEvaluator, toy_menu


@pytest.fixture
def task():
    return Problem.build(toy_menu(), 0.5)


def test_every_episode_sees_what_it_would_see_alone(task):
    env = Episodes(task, 8, lambda actions: np.zeros(len(actions)))
    chosen = np.random.default_rng(0).integers(0, task.levels, (task.steps, 8))
    seen = env.reset()
    for step in range(task.steps):
        entries = len(task.observation(()))
        for row in range(8):
            prefix = env.taken[row].tolist()
            assert np.array_equal(seen[row, :entries], task.observation(prefix))
            assert seen[row, entries:].tolist() == [float(other == step) for other in range(task.steps)]
            assert np.array_equal(env.env_method("action_masks")[row], task.mask(prefix))
        seen, rewards, dones, infos = env.step(chosen[step])
        assert (rewards == 0).all()
        assert dones.all() == (step == task.steps - 1)
    assert np.array_equal(seen, env.reset())
    for row, info in enumerate(infos):
        for step, level in enumerate(chosen[:, row]):
            legal = task.mask(info["actions"][:step])[level]
            assert info["actions"][step] == (level if legal else task.levels - 2)


def test_all_finished_episodes_are_scored_as_one_batch(task):
    batches = []

    def score(actions):
        batches.append(actions.shape)
        return np.arange(len(actions), dtype=float)

    env = Episodes(task, 5, score)
    env.reset()
    for _ in range(task.steps):
        _, rewards, _, _ = env.step(np.full(5, task.middle))
    assert batches == [(5, task.steps)]
    assert rewards.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("algorithm", [PPO, MaskablePPO])
def test_an_off_the_shelf_algorithm_learns_on_it(task, algorithm):
    evaluate, reward, batches = ToyEvaluator(task.menu), Reward(), []

    def score(actions):
        batches.append(len(actions))
        return np.array([reward(found) for found in evaluate([task.schedule(row) for row in actions])])

    model = algorithm("MlpPolicy", Episodes(task, 8, score), n_steps=6, batch_size=48, n_epochs=2, seed=0, device="cpu")
    model.learn(96)
    assert batches == [8] * 4


def test_an_attribute_that_no_episode_has_is_refused(task):
    env = Episodes(task, 2, lambda actions: np.zeros(len(actions)))
    with pytest.raises(AttributeError, match="no attribute 'speed'"):
        env.get_attr("speed")
    with pytest.raises(AttributeError, match="no attribute 'speed'"):
        env.set_attr("speed", 1)
    with pytest.raises(AttributeError, match="no method 'fly'"):
        env.env_method("fly")
