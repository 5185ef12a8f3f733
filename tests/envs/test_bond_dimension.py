import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import stable_baselines3.common.env_checker
from gymnasium.utils.env_checker import check_env
from sb3_contrib import MaskablePPO

from envs import GRANULARITIES, BondDimensionEnv, Problem, Reward, ToyEvaluator, toy_menu
from envs.problem import OBSERVATION


def play(env, actions):
    env.reset()
    return [env.step(action) for action in actions]


@pytest.mark.parametrize("one_shot", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gymnasium_and_stable_baselines3_find_nothing_to_complain_about(granularity, one_shot):
    # Warnings are errors in this suite.
    menu = toy_menu(heads=2)
    problem = Problem.build(menu, 0.5, granularity)
    env = gym.make("chisel/BondDimension-v0", problem=problem, evaluate=ToyEvaluator(menu), one_shot=one_shot)
    check_env(env.unwrapped)
    stable_baselines3.common.env_checker.check_env(env.unwrapped)
    env.close()


def test_the_environment_needs_no_arguments():
    env = gym.make("chisel/BondDimension-v0")
    env.reset(seed=0)
    assert env.unwrapped.problem.steps == 3


@pytest.mark.parametrize("one_shot", [False, True])
def test_algorithms_of_stable_baselines3_learn_on_it(one_shot):
    env = gym.make("chisel/BondDimension-v0", one_shot=one_shot)
    model = stable_baselines3.PPO("MlpPolicy", env, n_steps=8, batch_size=8, n_epochs=1, seed=0, device="cpu")
    assert model.learn(16).num_timesteps == 16
    masked = MaskablePPO("MlpPolicy", env, n_steps=8, batch_size=8, n_epochs=1, seed=0, device="cpu")
    assert masked.learn(16).num_timesteps == 16


def test_the_docstring_lists_the_observation_as_it_is():
    rows = [line.strip() for line in BondDimensionEnv.__doc__.splitlines() if line.strip().startswith("| ")]
    stated = [tuple(cell.strip() for cell in row.strip("|").split("|")) for row in rows[1:]]
    assert stated == [(str(i), name, f"{least:g}", f"{most:g}") for i, (name, least, most) in enumerate(OBSERVATION)]


def test_the_reward_comes_with_the_last_step_and_so_does_the_schedule():
    env = BondDimensionEnv()
    problem, m = env.problem, env.problem.middle
    *before, last = play(env, (m, m, m))
    assert [(reward, ended, cut, info) for _, reward, ended, cut, info in before] == [(0.0, False, False, {})] * 2
    _, reward, ended, cut, info = last
    assert (ended, cut) == (True, False)
    assert info["schedule"] == problem.closed_form()
    assert info["actions"] == (m, m, m)
    assert info["score"] == ToyEvaluator(problem.menu)([problem.closed_form()])[0]
    assert reward == Reward()(info["score"])


def test_an_episode_costs_one_evaluation():
    menu, calls = toy_menu(), []

    def evaluate(schedules):
        calls.extend(schedules)
        return ToyEvaluator(menu)(schedules)

    play(BondDimensionEnv(Problem.build(menu, 0.5), evaluate), (3, 4, 5))
    assert len(calls) == 1


def test_an_illegal_level_becomes_the_highest_rung():
    env = BondDimensionEnv()
    dense, highest = env.problem.dense_level, env.problem.levels - 2
    env.reset()
    env.step(dense)
    assert not env.action_masks()[dense]
    env.step(dense)
    *_, info = env.step(0)
    assert info["actions"] == (dense, highest, 0)


def test_one_shot_and_sequential_episodes_agree():
    sequential, at_once = BondDimensionEnv(), BondDimensionEnv(one_shot=True)
    dense = sequential.problem.dense_level
    for actions in [(7, 7, 7), (0, 14, 3), (dense, dense, 2)]:
        first, _ = at_once.reset()
        expected = play(sequential, actions)[-1]
        observed = at_once.step(np.array(actions))
        assert np.array_equal(first, sequential.problem.observation(()))
        assert np.array_equal(observed[0], expected[0])
        assert observed[1:] == expected[1:]
    assert at_once.action_masks().shape == (3 * at_once.problem.levels,)


def test_a_new_episode_forgets_the_last():
    env = BondDimensionEnv()
    once = play(env, (1, 2, 3))[-1]
    again = play(env, (1, 2, 3))[-1]
    assert once[1:] == again[1:]


def test_misuse_is_refused():
    env = BondDimensionEnv()
    with pytest.raises(ValueError, match="neither"):
        BondDimensionEnv(Problem.build(toy_menu(), 0.5))
    env.reset()
    with pytest.raises(ValueError, match="must lie in"):
        env.step(99)
    play(env, (0, 0, 0))
    with pytest.raises(ValueError, match="reset"):
        env.step(0)
