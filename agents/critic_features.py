"""Adds what slopes have taught to the observations of `envs.BondDimensionEnv`, for agents of any library.

Knows the environment and the critic; does not know models or agents.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from agents.measured import measured_slopes
from agents.protocol import ProblemLike
from agents.slope_critic import SlopeCritic
from compression.refusal import Refusal

__all__ = ["CriticFeatures"]

Floats = NDArray[np.float64]


class CriticFeatures(gym.Wrapper[NDArray[np.float32], Any, NDArray[np.float32], Any]):
    """Appends two entries for every group to the observation, first the prices of all groups, then their uncertainty.

    | entries | meaning | least | most |
    |---|---|---|---|
    | price | best log weight of the group's sites, minus that of all sites, over the reach of the ladder | -1 | 1 |
    | uncertainty | its standard deviation, over the same | 0 | 1 |

    The critic (`agents.slope_critic.SlopeCritic`) learns from the slopes and the KL of every episode when it ends. The
    entries therefore change from episode to episode, and not within one.

    Attributes:
        critic: what has been learned so far.
    """

    def __init__(self, env: gym.Env[NDArray[np.float32], Any]) -> None:
        """Wrap an environment that was made with `slopes`.

        Raises:
            ValueError: it is another environment, or it measures no slopes.
        """
        super().__init__(env)
        if getattr(env.unwrapped, "slopes", None) is None:
            raise Refusal("critic features need a BondDimensionEnv that was made with slopes")
        self.problem: ProblemLike = env.get_wrapper_attr("problem")
        self.critic = SlopeCritic(self.problem, shards=1)
        assert isinstance(env.observation_space, gym.spaces.Box)
        low, high = env.observation_space.low, env.observation_space.high
        steps = np.ones(self.problem.steps, dtype=np.float32)
        self.observation_space = gym.spaces.Box(
            np.concatenate([low, -steps, 0 * steps]), np.concatenate([high, steps, steps]), dtype=np.float32
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """See `gymnasium.Env`."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self._with_features(observation), info

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """See `gymnasium.Env`."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated:
            self._learn(info)
        return self._with_features(observation), float(reward), terminated, truncated, info

    def _learn(self, info: dict[str, Any]) -> None:
        found = measured_slopes(self.problem, info["schedule"], info["probe"], info["slopes"])
        self.critic.add_slopes(0, *found)
        self.critic.add_quality(0, found[0], -info["score"].kl)
        self.critic.fit(np.zeros(len(self.problem.sites)))

    def _with_features(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        share = self.problem.membership / self.problem.membership.sum(axis=0)
        reach = float(self.problem.offsets[-2])
        prices = self.critic.log_weights
        price = ((prices - prices.mean()) @ share) / reach
        doubt = np.sqrt(((self.critic.covariance @ share) * share).sum(axis=0)) / reach
        features = np.concatenate([np.clip(price, -1, 1), np.clip(doubt, 0, 1)])
        return np.concatenate([observation, features.astype(np.float32)])
