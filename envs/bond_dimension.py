"""Exposes the search for bond dimensions as a Gymnasium environment, `BondDimensionEnv`.

Knows the problem, a reward and a callable that scores schedules; does not know models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from compression.refusal import Refusal
from compression.schedule import Schedule
from envs.problem import OBSERVATION, Problem
from envs.reward import Reward, ScoreLike
from envs.toy import ToyEvaluator, toy_menu

__all__ = ["BondDimensionEnv"]


class BondDimensionEnv(gym.Env[NDArray[np.float32], Any]):
    """Decide how many parameters each group of a model's weight matrices keeps, so that the whole model meets a target.

    ## Episode
    An episode has one step per group (block, family, site or head, see `envs.problem.Problem.build`), in the order of
    `problem.groups`. It terminates after the last group and is never truncated. There is no randomness: the same
    actions always give the same schedule, and `reset(seed=...)` only seeds the generator of the action space. One
    episode costs one evaluation.

    ## Action
    `Discrete(levels)`. Every level l except the last is a rung of a ladder of log-price offsets. It multiplies the
    predicted costs of the group by exp(offsets[l]); then the Lagrangian allocation distributes the parameters over all
    sites. A higher rung gives the group a larger share of the parameters (`problem.share(step, level)` returns it),
    distributed optimally over its sites. The middle rung has offset 0; choosing it in every step gives the closed-form
    allocation. The last level keeps the whole group dense. After the last step the actions are projected exactly: the
    schedule keeps at most the target, and at least the target minus one step of χ.

    Only the dense level can be illegal, namely if it would leave too few parameters for the other groups even at their
    smallest χ. `action_masks()` returns the legal levels. An illegal action is replaced by the nearest legal one, the
    highest rung; `info["actions"]` lists the actions actually taken.

    ## Observation
    `Box` of float32 with these entries:

    | entry | meaning | least | most |
    |---|---|---|---|
    | 0 | steps taken so far, as a fraction of all steps | 0 | 1 |
    | 1 | whether the group is a family (1) or lies inside one block (0) | 0 | 1 |
    | 2 | mean depth of the group's sites, where the first block has 0 and the last block 1 | 0 | 1 |
    | 3 | parameters of the group, as a fraction of the parameters of all sites | 0 | 1 |
    | 4 | predicted cost of the group in the closed form, as a fraction of that of all groups of its kind | 0 | 1 |
    | 5 | parameters the group keeps in the closed form, as a fraction of its dense parameters | 0 | 1 |
    | 6 | increase of that fraction from the lowest rung to the highest | 0 | 1 |
    | 7 | free budget left after the groups forced dense, as a fraction of the free budget at the start | 0 | 1 |
    | 8 | offset of the previous step, as a fraction of the highest; 1 if dense, 0 at the first step | -1 | 1 |
    | 9 | mean of that fraction over the steps so far | -1 | 1 |
    | 10 | steps forced dense so far, as a fraction of all steps | 0 | 1 |
    | 11 | whether dense is a legal level now | 0 | 1 |

    The free budget is the target minus the parameters of the smallest options. After the last step the entries 1 to 6
    and 11 are 0.

    ## Reward
    The reward is 0 until the last step. The last step's reward is that of `envs.reward.Reward`, by default

        −KL + 0.1·(expected accuracy − dense expected accuracy) + (1 − kept fraction)

    It is never below the floor (−30), which is also the reward of a failed or non-finite evaluation. Bytes and time can
    be given a weight. The last step's info holds `schedule`, `score` and `actions`.

    ## Slopes
    With `slopes`, the last step's info also holds `probe`, the schedule in which each site is a little larger, and
    `slopes`: by name of the site or unit, the first-order change of the KL in nats per token if that one alone takes
    its choice in the probe. `problem.gains(schedule, probe, slopes)` compares them with the prediction. Such an episode
    costs as much as four evaluations. `agents.critic_features.CriticFeatures` adds what they teach to the observation.

    ## One-shot variant
    With `one_shot=True` an episode has a single step: the action is `MultiDiscrete` with one level per group, and the
    observation is the first one of the sequential episode. Illegal levels are replaced in the order of the groups.
    `action_masks()` concatenates the masks of all groups, each as if no other group were dense.

    ## Version history
    * v0: first version.

    Args:
        problem: defines the steps, the levels and the projection; None uses a toy problem of three blocks.
        evaluate: returns the scores of schedules, in order; None uses the toy evaluator. Give `problem` and `evaluate`
            together or neither.
        reward: maps a score to a reward; None uses `Reward()`.
        one_shot: whether an episode is a single step, see above.
        slopes: measures slopes from a schedule towards a probe; None measures none.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own declaration

    def __init__(
        self,
        problem: Problem | None = None,
        evaluate: Callable[[Sequence[Schedule]], Sequence[ScoreLike]] | None = None,
        reward: Callable[[ScoreLike], float] | None = None,
        one_shot: bool = False,
        slopes: Callable[[Schedule, Schedule], Mapping[str, float]] | None = None,
    ) -> None:
        if (problem is None) != (evaluate is None):
            raise Refusal("give both problem and evaluate, or neither for the toy")
        self.problem = Problem.build(toy_menu(), target_kept=0.5) if problem is None else problem
        self.evaluate = ToyEvaluator(self.problem.menu) if evaluate is None else evaluate
        self.reward = Reward() if reward is None else reward
        self.one_shot = one_shot
        self.slopes = slopes
        levels = self.problem.levels
        self.action_space = (
            gym.spaces.MultiDiscrete([levels] * self.problem.steps) if one_shot else gym.spaces.Discrete(levels)
        )
        self.observation_space = gym.spaces.Box(
            low=np.array([least for _, least, _ in OBSERVATION], dtype=np.float32),
            high=np.array([most for _, _, most in OBSERVATION], dtype=np.float32),
        )
        self._taken: list[int] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start an episode. `options` is not used."""
        super().reset(seed=seed)
        self._taken = []
        return self.problem.observation(()), {}

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Choose the level of the next group, or with `one_shot` the levels of all groups.

        Raises:
            ValueError: a level is outside the action space, or the episode has ended.
        """
        if len(self._taken) == self.problem.steps:
            raise Refusal("the episode has ended: call reset() before step()")
        if not self.action_space.contains(action):
            raise Refusal(f"an action must lie in {self.action_space}, got {action!r}")
        self._taken = self.problem.legalise([*self._taken, *np.atleast_1d(action)]).tolist()
        observation = self.problem.observation(self._taken)
        if len(self._taken) < self.problem.steps:
            return observation, 0.0, False, False, {}
        schedule = self.problem.schedule(self._taken)
        score = self.evaluate([schedule])[0]
        info: dict[str, Any] = {"schedule": schedule, "score": score, "actions": tuple(self._taken)}
        if self.slopes is not None:
            probe = self.problem.probe(schedule)
            info |= {"probe": probe, "slopes": self.slopes(schedule, probe)}
        return observation, float(self.reward(score)), True, False, info

    def action_masks(self) -> NDArray[np.bool_]:
        """Returns which levels are legal at this step, (levels,); all are after the end of the episode.

        With `one_shot` the shape is (steps·levels,), see the class.
        """
        if not self.one_shot:
            return self.problem.mask(self._taken)
        return np.concatenate([self.problem.mask((self.problem.middle,) * step) for step in range(self.problem.steps)])
