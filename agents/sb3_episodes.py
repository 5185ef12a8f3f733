"""Runs many episodes of a problem in lockstep, as a vector environment of stable-baselines3.

All episodes have the same number of steps, so they end together. The last step passes all finished episodes to the
scoring function as one batch, so no thread or process waits. Works unchanged with `PPO.learn` and `MaskablePPO.learn`.
Knows the problem and the scoring function; does not know agents or budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from agents.protocol import ProblemLike

__all__ = ["Episodes"]


class Episodes(VecEnv):
    """Runs `count` episodes of `problem`, taking one step of all of them at a time.

    The observation is the problem's own followed by a one-hot code of the step, so that a small network can tell steps
    apart. An illegal level is replaced by the highest rung. The reward is 0 until the last step. Then the episodes
    start again, as stable-baselines3 requires, and the infos hold `actions`, the levels actually taken, and
    `terminal_observation`.

    Args:
        problem: the problem whose episodes are run.
        count: number of episodes, at least 1.
        score: function from n finished legal episodes, (n, steps), to rewards, (n,); called once per batch.
    """

    def __init__(
        self, problem: ProblemLike, count: int, score: Callable[[NDArray[np.int64]], NDArray[np.float64]]
    ) -> None:
        self.problem = problem
        self.score = score
        self.taken = np.zeros((count, 0), dtype=np.int64)
        size = problem.observation(()).shape[0] + problem.steps
        super().__init__(count, gym.spaces.Box(-1.0, 1.0, (size,), np.float32), gym.spaces.Discrete(problem.levels))

    def observations(self) -> NDArray[np.float32]:
        """Current observations, (count, entries)."""
        seen = self.problem.observation(self.taken)
        step = np.arange(self.problem.steps) == self.taken.shape[1]
        return np.concatenate([seen, np.tile(step.astype(np.float32), (self.num_envs, 1))], axis=1)

    def masks(self) -> NDArray[np.bool_]:
        """Whether each level is legal now, (count, levels)."""
        return self.problem.mask(self.taken)

    def reset(self) -> NDArray[np.float32]:
        """Restarts all episodes and returns the first observations, (count, entries)."""
        self.taken = self.taken[:, :0]
        return self.observations()

    def step_async(self, actions: NDArray[np.int64]) -> None:
        """Takes one level in every episode, (count,)."""
        self.taken = self.problem.legalise(np.concatenate([self.taken, actions[:, None]], axis=1))

    def step_wait(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Returns observations, rewards, whether the episodes ended, and infos, as stable-baselines3 requires."""
        rewards, done = np.zeros(self.num_envs, dtype=np.float32), self.taken.shape[1] == self.problem.steps
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        seen = self.observations()
        if done:
            rewards = self.score(self.taken).astype(np.float32)
            infos = [
                {"actions": tuple(levels), "terminal_observation": last}
                for levels, last in zip(self.taken.tolist(), seen, strict=True)
            ]
            seen = self.reset()
        return seen, rewards, np.full(self.num_envs, done), infos

    def close(self) -> None:
        """Does nothing; the environment holds no resources."""

    def get_attr(self, attr_name: str, indices: int | Iterable[int] | None = None) -> list[Any]:
        """Returns the attribute once per episode; only `render_mode` and `action_masks` (for sb3-contrib) exist."""
        known = {"render_mode": None, "action_masks": self.masks}
        if attr_name not in known:
            raise AttributeError(f"episodes in lockstep have no attribute {attr_name!r}")
        return [known[attr_name] for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: int | Iterable[int] | None = None) -> None:
        """Raises AttributeError, since episodes have no attributes that can be set."""
        raise AttributeError(f"episodes in lockstep have no attribute {attr_name!r} to set")

    def env_method(
        self, method_name: str, *arguments: Any, indices: int | Iterable[int] | None = None, **named: Any
    ) -> list[Any]:
        """Returns `action_masks()` of every episode, (levels,) each; there is no other method."""
        if method_name != "action_masks":
            raise AttributeError(f"episodes in lockstep have no method {method_name!r}")
        masks = self.masks()
        return [masks[index] for index in self._get_indices(indices)]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: int | Iterable[int] | None = None
    ) -> list[bool]:
        """Returns False for every episode, since episodes are never wrapped."""
        return [False for _ in self._get_indices(indices)]
