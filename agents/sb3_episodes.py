"""Vector: episodes of a task in lockstep, as a vector environment of stable-baselines3.

All episodes have the same number of steps, so they end together, and the last step hands every finished one out as one
batch: what scores them may do so in one go, and no thread or process waits. Works with `PPO.learn` and
`MaskablePPO.learn` as it is. Knows the task and a callable; no agent, no budget.
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
    """`count` episodes of `problem`, one step of all of them at a time.

    The observation is the task's own, with the step one-hot behind it, so that a small network can tell steps apart. An
    illegal level is taken as the highest rung. The reward is 0 until the last step. Then the episodes begin anew, as
    stable-baselines3 wants it, and the infos hold `actions`, what was really taken, and `terminal_observation`.

    Args:
        score: rewards (n,) of n finished episodes (n, steps), each legal; called once per batch.
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
        """What the episodes see now, (count, entries)."""
        seen = self.problem.observation(self.taken)
        step = np.arange(self.problem.steps) == self.taken.shape[1]
        return np.concatenate([seen, np.tile(step.astype(np.float32), (self.num_envs, 1))], axis=1)

    def masks(self) -> NDArray[np.bool_]:
        """Legal levels now, (count, levels)."""
        return self.problem.mask(self.taken)

    def reset(self) -> NDArray[np.float32]:
        """Begin anew; gives the first observations."""
        self.taken = self.taken[:, :0]
        return self.observations()

    def step_async(self, actions: NDArray[np.int64]) -> None:
        """Take one level in every episode, (count,)."""
        self.taken = self.problem.legalise(np.concatenate([self.taken, actions[:, None]], axis=1))

    def step_wait(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Observations, rewards, whether the episodes ended, infos; as stable-baselines3 wants them."""
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
        """Nothing is held."""

    def get_attr(self, attr_name: str, indices: int | Iterable[int] | None = None) -> list[Any]:
        """The same for all episodes. `action_masks`, which sb3-contrib looks for, is a method of theirs."""
        known = {"render_mode": None, "action_masks": self.masks}
        if attr_name not in known:
            raise AttributeError(f"episodes in lockstep have no attribute {attr_name!r}")
        return [known[attr_name] for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: int | Iterable[int] | None = None) -> None:
        """Refused: an episode has no attribute of its own."""
        raise AttributeError(f"episodes in lockstep have no attribute {attr_name!r} to set")

    def env_method(
        self, method_name: str, *arguments: Any, indices: int | Iterable[int] | None = None, **named: Any
    ) -> list[Any]:
        """`action_masks()` of every episode; there is no other."""
        if method_name != "action_masks":
            raise AttributeError(f"episodes in lockstep have no method {method_name!r}")
        masks = self.masks()
        return [masks[index] for index in self._get_indices(indices)]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: int | Iterable[int] | None = None
    ) -> list[bool]:
        """Never."""
        return [False for _ in self._get_indices(indices)]
