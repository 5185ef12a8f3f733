"""BondDimensionEnv: the search for bond dimensions as a Gymnasium environment.

Knows the problem, a reward and a callable that scores schedules; never sees a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """Choose how many parameters every group of a model's weight matrices keeps, so that the whole meets a target.

    ## Episode
    One step per group (block, family, site or head, see `envs.problem.Problem.build`), in the order of
    `problem.groups`. The episode terminates after the last group; it is never truncated. There is no randomness: the
    same actions end in the same schedule, and `reset(seed=...)` seeds only the action space's own generator in the
    usual way. One episode costs one evaluation.

    ## Action
    `Discrete(levels)`. Level l below the last is a rung of a ladder of log-price offsets: it multiplies the predicted
    costs of the group by exp(offsets[l]) before the menu's Lagrangian distributes the parameters over all sites, so a
    higher rung means a larger share of parameters for the group (`problem.share(step, level)` says how large), spread
    best over its sites. The middle rung has offset 0; all-middle is the closed-form allocation. The last level keeps
    the whole group dense. After the last step the actions are projected exactly: the schedule keeps at most the target,
    and at least the target less one step of χ.

    Only dense can be illegal: when it would leave no room for the rest even at the smallest χ. `action_masks()` tells.
    An illegal action is replaced by the nearest legal one, the highest rung; `info["actions"]` lists what was really
    taken.

    ## Observation
    `Box` of float32, one entry each for

    | entry | meaning | least | most |
    |---|---|---|---|
    | 0 | steps taken so far, as a fraction of all steps | 0 | 1 |
    | 1 | whether the group is a family (1) or lies inside one block (0) | 0 | 1 |
    | 2 | mean depth of the group's sites, first block 0, last block 1 | 0 | 1 |
    | 3 | parameters of the group, as a fraction of all sites' | 0 | 1 |
    | 4 | predicted cost of the group in the closed form, as a fraction of all groups' of its kind | 0 | 1 |
    | 5 | parameters the group keeps in the closed form, as a fraction of its own | 0 | 1 |
    | 6 | what that fraction gains when the offset goes from the lowest rung to the highest | 0 | 1 |
    | 7 | budget left beside the groups forced dense and the smallest options, as a fraction of the whole | 0 | 1 |
    | 8 | offset of the previous step, as a fraction of the highest; 1 if dense, 0 at the first step | -1 | 1 |
    | 9 | mean of those fractions over the steps so far | -1 | 1 |
    | 10 | steps forced dense so far, as a fraction of all steps | 0 | 1 |
    | 11 | whether dense is a legal level now | 0 | 1 |

    After the last step the entries 1 to 6 and 11 are 0.

    ## Reward
    0 until the last step, then what `envs.reward.Reward` says, by default

        −KL + 0.1·(expected accuracy − dense expected accuracy) + (1 − kept fraction)

    and never below the floor (−30), which is also the reward of a failed or non-finite evaluation; bytes and time can
    be given a weight.
    The last step's info holds `schedule`, `score` and `actions`.

    ## One-shot variant
    With `one_shot=True` an episode is one step: the action is `MultiDiscrete` with one level per group, the observation
    is the first one of the sequential episode, illegal levels are replaced from the first group on, and
    `action_masks()` is the concatenation of the masks of all groups with no other group dense.

    ## Version history
    * v0: first version.

    Args:
        problem: steps, levels and projection; a toy of three blocks when None.
        evaluate: scores of schedules, in order; the toy's when None. Give both or neither.
        reward: from a score; `Reward()` when None.
        one_shot: see above.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own declaration

    def __init__(
        self,
        problem: Problem | None = None,
        evaluate: Callable[[Sequence[Schedule]], Sequence[ScoreLike]] | None = None,
        reward: Callable[[ScoreLike], float] | None = None,
        one_shot: bool = False,
    ) -> None:
        if (problem is None) != (evaluate is None):
            raise Refusal("give both problem and evaluate, or neither for the toy")
        self.problem = Problem.build(toy_menu(), target_kept=0.5) if problem is None else problem
        self.evaluate = ToyEvaluator(self.problem.menu) if evaluate is None else evaluate
        self.reward = Reward() if reward is None else reward
        self.one_shot = one_shot
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
        """Begin an episode. `options` is not used."""
        super().reset(seed=seed)
        self._taken = []
        return self.problem.observation(()), {}

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Take one level, or with `one_shot` all of them.

        Raises:
            ValueError: a level outside the ladder, or a step after the end of the episode.
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
        info = {"schedule": schedule, "score": score, "actions": tuple(self._taken)}
        return observation, float(self.reward(score)), True, False, info

    def action_masks(self) -> NDArray[np.bool_]:
        """Legal levels, (levels,), now; all legal after the end. With `one_shot` (steps·levels,), see the class."""
        if not self.one_shot:
            return self.problem.mask(self._taken)
        return np.concatenate([self.problem.mask((self.problem.middle,) * step) for step in range(self.problem.steps)])
