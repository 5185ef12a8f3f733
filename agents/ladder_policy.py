"""The policy of `agents.ppo`: a distribution over the levels of every step, sampled in whole episodes.

The policy reads the problem's observation and the index of the step, and outputs three numbers: μ, log σ and d. It
takes dense with probability sigmoid(d), else rung l with probability ∝ exp(−(o_l − μ)² / 2σ²), where o_l is the rung's
offset. It starts with μ = 0 at every step, so its mode is the closed form. (With a free logit per level, a policy
learns nothing from one rung about its neighbours; on synthetic costs it found half the gain.)

The gradient steps are `train()` of stable-baselines3's PPO and sb3-contrib's MaskablePPO (Schulman et al. 2017; masks
as in Huang & Ontañón 2022), with generalised advantages from a value network (Schulman et al. 2016), normalised per
batch. Their `learn()` is not used, since it counts its own steps and would spend any budget.

Knows episodes and their returns; does not know where returns come from, schedules or budgets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger

from agents.protocol import ProblemLike
from agents.sb3_episodes import Episodes

__all__ = ["LadderPolicy", "LadderSettings", "Rollout"]

_HALVINGS = 10  # of the way back to an earlier policy

Floats = NDArray[np.float64]
Levels = NDArray[np.int64]


@dataclass(frozen=True)
class LadderSettings:
    """Settings of the policy and of its gradient steps."""

    epochs: int = 10  # gradient steps per rollout
    learning_rate: float = 0.03  # of Adam
    clip: float = 0.2  # PPO's clipping range for the probability ratio
    gae_lambda: float = 0.95  # λ of the generalised advantages; 1 uses the reward alone, less the value network more
    hidden: int = 32  # hidden units of the value network
    sigma: float = 0.3  # σ at the start, in log price
    smallest_sigma: float = 0.05
    largest_sigma: float = 0.6
    dense_groups: float = 0.1  # mean number of groups that an episode keeps dense at the start


@dataclass(frozen=True, eq=False)
class Rollout:
    """Finished episodes.

    Attributes:
        seen: observations, (steps, n, entries).
        masks: whether each level was legal, (steps, n, levels).
        chosen: levels chosen by the policy, (steps, n).
        taken: levels after illegal ones were replaced, (n, steps).
    """

    seen: NDArray[np.float32]
    masks: NDArray[np.bool_]
    chosen: Levels
    taken: Levels


class Ladder(torch.nn.Module):
    """Maps observations to logits of the levels, (n, entries) -> (n, levels); μ, log σ and d are linear in them."""

    def __init__(self, entries: int, problem: ProblemLike, settings: LadderSettings) -> None:
        super().__init__()
        self.rungs = torch.tensor(problem.offsets[:-1], dtype=torch.float32)
        self.limits = math.log(settings.smallest_sigma), math.log(settings.largest_sigma)
        self.linear = torch.nn.Linear(entries, 3)
        chance = min(0.5, settings.dense_groups / problem.steps)
        with torch.no_grad():
            self.linear.weight.zero_()
            self.linear.bias.copy_(torch.tensor([0.0, math.log(settings.sigma), math.log(chance / (1 - chance))]))

    def forward(self, seen: torch.Tensor) -> torch.Tensor:
        mean, log_sigma, dense = self.linear(seen).unbind(-1)
        sigma = log_sigma.clamp(*self.limits).exp()
        rungs = -0.5 * ((self.rungs - mean[:, None]) / sigma[:, None]) ** 2
        return torch.cat([rungs, (dense + rungs.logsumexp(-1))[:, None]], dim=-1)


class LadderPolicy:
    """See the module."""

    def __init__(self, problem: ProblemLike, masked: bool, seed: int, settings: LadderSettings) -> None:
        """Makes the library's algorithm with a ladder as policy head and a separate value network.

        Args:
            masked: whether illegal levels have no probability; otherwise the highest rung replaces them.
            seed: of the value network's first weights.
        """
        self._problem, self._masked, self._settings = problem, masked, settings
        steps = problem.steps
        with _own_randomness(seed):
            self._model: Any = (MaskablePPO if masked else PPO)(
                "MlpPolicy",
                Episodes(problem, 2, lambda actions: np.zeros(len(actions))),
                learning_rate=settings.learning_rate,
                n_steps=steps,
                batch_size=2 * steps,
                n_epochs=settings.epochs,
                gamma=1.0,
                gae_lambda=settings.gae_lambda,
                clip_range=settings.clip,
                policy_kwargs={"net_arch": {"pi": [], "vf": [settings.hidden]}},
                device="cpu",
            )
            policy = self._model.policy
            policy.action_net = Ladder(len(problem.observation(())) + steps, problem, settings)
            policy.optimizer = torch.optim.Adam(policy.parameters(), lr=settings.learning_rate, eps=1e-5)
            self._model.set_logger(Logger(None, []))

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The weights of policy and value network, copied; Adam's moments are not among them."""
        return {name: values.numpy().copy() for name, values in self._model.policy.state_dict().items()}

    def load(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Takes over what `arrays` gave."""
        self._model.policy.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})

    @property
    def mode(self) -> Levels:
        """The greedy episode, (steps,)."""
        levels: Levels = self._roll(np.zeros((1, 0)), greedy=True).taken[0]
        return levels

    def sample(self, count: int, generator: np.random.Generator, widening: float = 1.0) -> Rollout:
        """Samples episodes in antithetic pairs; `widening` multiplies σ."""
        half = generator.random((-(-count // 2), self._problem.steps))
        return self._roll(np.stack([half, 1 - half], axis=1).reshape(-1, self._problem.steps)[:count], widening)

    def train(self, rollout: Rollout, returns: Floats, entropy: float, seed: int) -> None:
        """Makes the library's gradient steps on finished episodes.

        Args:
            returns: paid at the last steps of the episodes, (n,); nothing happens if they are equal.
            entropy: bonus per nat of entropy and step.
            seed: of the order of the gradient steps' data.
        """
        if returns.std() < 1e-12:
            return
        model, (steps, count) = self._model, rollout.chosen.shape
        returns = (returns - returns.mean()) / returns.std()
        given = (torch.from_numpy(rollout.masks).flatten(0, 1),) if self._masked else ()
        with torch.no_grad():
            values, log_probabilities, _ = model.policy.evaluate_actions(
                torch.from_numpy(rollout.seen).flatten(0, 1), torch.from_numpy(rollout.chosen).flatten(), *given
            )
        values, log_probabilities = values.reshape(steps, count), log_probabilities.reshape(steps, count)
        buffer = type(model.rollout_buffer)(
            steps,
            model.observation_space,
            model.action_space,
            "cpu",
            gae_lambda=self._settings.gae_lambda,
            gamma=1.0,
            n_envs=count,
        )
        for step in range(steps):
            buffer.add(
                rollout.seen[step],
                rollout.chosen[step],
                returns if step == steps - 1 else np.zeros(count),
                np.full(count, step == 0),
                values[step],
                log_probabilities[step],
                **({"action_masks": rollout.masks[step]} if self._masked else {}),
            )
        buffer.compute_returns_and_advantage(torch.zeros(count), np.ones(count))
        model.rollout_buffer, model.batch_size, model.ent_coef = buffer, steps * count, entropy
        with _own_randomness(seed):
            model.train()

    def retreat(self, before: Mapping[str, NDArray[Any]], rollout: Rollout, trust: float) -> float:
        """Goes back towards an earlier policy, `arrays` of it, until it lies within a trust region around that.

        μ, log σ and d are linear in the weights, so a part of the way in the weights is as large a part in them.

        Args:
            rollout: episodes, in whose observations the policies are compared.
            trust: largest mean KL(earlier ‖ new) of a step, nats.

        Returns:
            The mean KL before the retreat.
        """
        head = self._model.policy.action_net
        after = {name: values.clone() for name, values in head.state_dict().items()}
        earlier = {name: torch.from_numpy(before[f"action_net.{name}"]) for name in after}
        seen = torch.from_numpy(rollout.seen).flatten(0, 1)

        def logits(part: float) -> torch.Tensor:
            head.load_state_dict({name: earlier[name] + part * (after[name] - earlier[name]) for name in after})
            with torch.no_grad():
                found: torch.Tensor = head(seen).double().log_softmax(-1)
            return found

        old = logits(0.0)

        def divergence(part: float) -> float:
            return float((old.exp() * (old - logits(part))).sum(-1).mean())

        found = divergence(1.0)
        if found > trust:
            low, high = 0.0, 1.0
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                low, high = (middle, high) if divergence(middle) <= trust else (low, middle)
            logits(low)
        return found

    def _roll(self, uniform: Floats, widening: float = 1.0, greedy: bool = False) -> Rollout:
        """Runs n episodes: takes the likeliest levels, or samples by the numbers `uniform` in [0, 1), (n, steps)."""
        env = Episodes(self._problem, len(uniform), lambda actions: np.zeros(len(actions)))
        seen, masks, chosen = [env.reset()], [env.masks()], []
        for step in range(self._problem.steps):
            with torch.no_grad():
                given = (masks[-1],) if self._masked else ()
                logits = self._model.policy.get_distribution(torch.from_numpy(seen[-1]), *given).distribution.logits
            weights = logits.numpy().astype(np.float64) / widening**2
            weights = np.exp(weights - weights.max(axis=1, keepdims=True))
            if greedy:
                levels = weights.argmax(axis=1)
            else:
                below = np.cumsum(weights / weights.sum(axis=1, keepdims=True), axis=1)[:, :-1]
                levels = (uniform[:, step, None] > below).sum(axis=1)
            chosen.append(levels)
            env.step_async(levels)
            if step < self._problem.steps - 1:
                seen.append(env.observations())
                masks.append(env.masks())
        return Rollout(np.stack(seen), np.stack(masks), np.stack(chosen), env.taken)


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Seeds the global generators of torch and NumPy, from which the libraries draw, and restores them at the end."""
    before = np.random.get_state()  # noqa: NPY002 - the libraries use the global generator
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(before)  # noqa: NPY002
