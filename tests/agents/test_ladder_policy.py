import numpy as np
import pytest
import torch

from agents.ladder_policy import LadderPolicy, LadderSettings
from envs import Problem, toy_menu

BOTH = pytest.mark.parametrize("masked", [False, True])


def problem(blocks=3, target=0.5):
    return Problem.build(toy_menu(blocks), target, "block")


def policy_of(task, masked=False, **settings):
    return LadderPolicy(task, masked, 0, LadderSettings(**settings))


def probabilities(policy, task, prefix):
    """Of the levels at the step after `prefix`."""
    seen = np.concatenate([task.observation(prefix), np.eye(task.steps, dtype=np.float32)[len(prefix)]])[None]
    masks = (task.mask(prefix)[None],) if policy._masked else ()
    return policy._model.policy.get_distribution(torch.from_numpy(seen), *masks).distribution.probs[0].detach().numpy()


@BOTH
def test_the_policy_starts_as_a_ladder_around_the_closed_form_with_dense_rare(masked):
    task = problem(10)
    policy = policy_of(task, masked)
    found = probabilities(policy, task, ())
    expected = np.exp(-(task.offsets[:-1] ** 2) / (2 * 0.3**2))
    dense = 0.1 / 10
    assert found[:-1] == pytest.approx((1 - dense) * expected / expected.sum(), abs=1e-5)
    assert found[-1] == pytest.approx(dense, rel=1e-4)
    assert policy.mode.tolist() == [task.middle] * 10


def test_samples_follow_the_probabilities_and_only_masks_forbid_dense():
    task = problem(target=0.4)
    for masked in (False, True):
        policy = policy_of(task, masked)
        with torch.no_grad():
            policy._model.policy.action_net.linear.bias[2] = 3.0  # dense nearly always, where it is allowed
        rollout = policy.sample(2000, np.random.default_rng(0))
        first = np.bincount(rollout.chosen[0], minlength=task.levels) / 2000
        assert first == pytest.approx(probabilities(policy, task, ()), abs=0.02)
        chosen = rollout.chosen == task.levels - 1
        illegal = chosen & ~rollout.masks[:, :, -1]
        assert illegal.any() != masked
        for levels in rollout.taken[:50].tolist():
            assert all(task.mask(levels[:step])[level] for step, level in enumerate(levels))
        assert (rollout.taken.T[illegal] == task.levels - 2).all()


def test_the_reward_comes_last_and_the_advantages_are_those_of_the_value_network():
    task = problem(5, 0.6)
    policy = policy_of(task, gae_lambda=0.9)
    rollout = policy.sample(6, np.random.default_rng(0))
    policy._model.train = lambda: None
    returns = np.arange(6.0)
    policy.train(rollout, returns, 0.0, 0)
    buffer = policy._model.rollout_buffer
    standardised = (returns - returns.mean()) / returns.std()
    assert (buffer.rewards[:-1] == 0).all()
    assert buffer.rewards[-1] == pytest.approx(standardised)
    for episode in range(6):
        advantage = 0.0
        for step in reversed(range(task.steps)):
            later = buffer.values[step + 1, episode] if step < task.steps - 1 else standardised[episode]
            advantage = later - buffer.values[step, episode] + 0.9 * advantage
            assert buffer.advantages[step, episode] == pytest.approx(advantage, abs=1e-5)


@BOTH
def test_a_policy_goes_back_to_where_it_is_trusted_and_not_further(masked):
    task, generator = problem(6), np.random.default_rng(0)
    policy = policy_of(task, masked)
    before = policy.arrays
    rollout = policy.sample(64, generator)
    policy.train(rollout, -np.square(task.offsets[np.minimum(rollout.taken, task.levels - 2)] - 1).sum(axis=1), 0.0, 1)
    trained = policy.arrays
    moved = policy.retreat(before, rollout, 1e9)
    assert all((policy.arrays[name] == trained[name]).all() for name in trained)
    policy.retreat(before, rollout, moved / 4)
    left = policy.retreat(before, rollout, 1e9)
    assert 0.2 * moved < left <= moved / 4
    policy.retreat(before, rollout, 0.0)
    assert policy.retreat(before, rollout, 1e9) == pytest.approx(0, abs=1e-9)
