"""PPO on a ladder, warm-started from the closed form: the whole algorithm but its gradient steps, top to bottom.

The gradient steps are `train()` of stable-baselines3's PPO and sb3-contrib's MaskablePPO (Schulman et al. 2017; masks
as Huang & Ontañón 2022), with generalised advantages from a value network (Schulman et al. 2016), normalised per batch.
Their `learn()` counts steps of its own and would spend any budget, so it is not used: episodes are collected here, and
rollout buffers are filled when rewards are known.

The policy reads the task's observation and which step it is, and gives three numbers: μ, log σ and d. It takes dense
with probability sigmoid(d), else rung l with probability ∝ exp(−(o_l − μ)² / 2σ²), where o_l is the rung's offset. It
starts at μ = 0 everywhere: its mode is the closed form, the first proposal. (A free logit per level learns from one
rung nothing about its neighbours; on synthetic costs that found half the gain.)

A trial costs forward passes of a language model, so a few hundred must do. Between two batches of trials a surrogate,
see `agents.surrogate`, is fitted on all trials; the policy then learns from rounds of imagined episodes that the
surrogate scores, at no cost, and in the first round also from its own new trials, at the rewards they really had. An
imagined episode is worth the surrogate's mean and a few of its standard deviations, fewer as the budget runs out: what
might be good is tried (upper confidence bounds, Srinivas et al. 2010).

`ppo` may choose dense where it is illegal; it is then taken as the highest rung, as `envs.BondDimensionEnv` does.
`ppo-masked` cannot. Knows nothing of models, and of schedules only that they have a digest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger

from agents.batch_agent import BatchAgent
from agents.policy_file import SavedPolicy
from agents.protocol import AgentContext, ProblemLike, Proposal
from agents.sb3_episodes import Episodes
from agents.surrogate import Surrogate, without_outliers

__all__ = ["Ppo", "PpoMasked", "PpoSettings"]

_TRIES = 50  # samplings for a schedule not proposed before; then the neighbourhood counts as exhausted

Floats = NDArray[np.float64]
Levels = NDArray[np.int64]


@dataclass(frozen=True)
class PpoSettings:
    """What can be tuned; the defaults were set on synthetic costs of 37 steps with 4 % of noise, at 200 trials.

    Imagined episodes took the true cost there from 0.86 to 0.83 of the closed form's, optimism to 0.80 (three seeds).
    """

    batch: int = 10  # real episodes between two times of learning, the greedy one included
    rounds: int = 3  # imagined rollouts in a time of learning
    imagined: int = 96  # episodes of an imagined rollout, even
    epochs: int = 10  # gradient steps on a rollout
    optimism: float = 1.0  # standard deviations of the surrogate added to what it expects, at the start; falls to 0
    learning_rate: float = 0.03  # Adam's
    clip: float = 0.2  # of the ratio of probabilities
    entropy: float = 0.01  # bonus per nat and step at the start; falls to 0
    gae_lambda: float = 0.95  # 1 waits for the reward, less trusts the value network
    hidden: int = 32  # units of the value network
    sigma: float = 0.3  # exploration at the start, in log price
    smallest_sigma: float = 0.05
    largest_sigma: float = 0.6
    dense_groups: float = 0.1  # groups an episode keeps dense on average at the start
    memory: int = 400  # the surrogate remembers this many latest trials


class _Ladder(torch.nn.Module):
    """Logits of the levels, (n, levels), from what a step sees, (n, entries): linear in μ, log σ and d."""

    def __init__(self, entries: int, problem: ProblemLike, settings: PpoSettings) -> None:
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


@dataclass(frozen=True, eq=False)
class _Rollout:
    """Finished episodes.

    Attributes:
        seen: (steps, n, entries).
        masks: legal levels, (steps, n, levels).
        chosen: levels by the policy, (steps, n).
        taken: levels after illegal ones were replaced, (n, steps).
    """

    seen: NDArray[np.float32]
    masks: NDArray[np.bool_]
    chosen: Levels
    taken: Levels

    def of(self, rows: Sequence[int]) -> _Rollout:
        """Some of the episodes."""
        return _Rollout(self.seen[:, rows], self.masks[:, rows], self.chosen[:, rows], self.taken[rows])

    def beside(self, other: _Rollout) -> _Rollout:
        """These episodes and then the others."""
        return _Rollout(
            np.concatenate([self.seen, other.seen], axis=1),
            np.concatenate([self.masks, other.masks], axis=1),
            np.concatenate([self.chosen, other.chosen], axis=1),
            np.concatenate([self.taken, other.taken]),
        )


class Ppo(BatchAgent):
    """See the module."""

    name = "ppo"
    masked = False

    def __init__(self, problem: ProblemLike, context: AgentContext, settings: PpoSettings | None = None) -> None:
        super().__init__(problem, context)
        self.settings = settings or PpoSettings()
        self.surrogate = Surrogate(problem)
        with _own_randomness(context.seed):
            self._model = self._build()
        if context.policy is not None:
            arrays = context.policy.restore(self.name, context.model, problem.names, problem.offsets, self._arrays())
            self._model.policy.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
        # The policy's own samples of this batch, and the digests of their schedules.
        self._sampled: tuple[_Rollout, list[str]] | None = None
        self._learned = 0

    def recommend(self, count: int) -> list[Proposal]:
        """See `agents.Agent`. The policy's mode, then the trials of which the surrogate expects most."""
        self._learn()
        if not self._learned:
            return self._ledger.best(count)
        return self._distinct(np.vstack([self.mode(), self._believed(self.surrogate)]), count)

    def mode(self) -> Levels:
        """The greedy episode, (steps,)."""
        levels: Levels = self._roll(np.zeros((1, 0)), greedy=True).taken[0]
        return levels

    def saved_policy(self) -> SavedPolicy:
        """See `agents.Learner`. Policy and value network without Adam's moments; what was told is learned first."""
        self._learn()
        return SavedPolicy(
            agent=self.name,
            model=self._context.model,
            target_kept=self._problem.target_kept,
            steps=self._problem.names,
            rungs=tuple(self._problem.offsets[:-1].tolist()),
            settings=asdict(self.settings),
            arrays=self._arrays(),
        )

    def _build(self) -> Any:
        """The library's algorithm around our policy head; a value network of its own."""
        settings, steps = self.settings, self._problem.steps
        entries = len(self._problem.observation(())) + steps
        env = Episodes(self._problem, settings.imagined, self.surrogate)
        model = (MaskablePPO if self.masked else PPO)(
            "MlpPolicy",
            env,
            learning_rate=settings.learning_rate,
            n_steps=steps,
            batch_size=steps * settings.imagined,
            n_epochs=settings.epochs,
            gamma=1.0,
            gae_lambda=settings.gae_lambda,
            clip_range=settings.clip,
            policy_kwargs={"net_arch": {"pi": [], "vf": [settings.hidden]}},
            device="cpu",
        )
        policy = model.policy
        policy.action_net = _Ladder(entries, self._problem, settings)
        policy.optimizer = torch.optim.Adam(policy.parameters(), lr=settings.learning_rate, eps=1e-5)
        model.set_logger(Logger(None, []))
        return model

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {name: values.numpy().copy() for name, values in self._model.policy.state_dict().items()}

    def _plan(self) -> None:
        """Fill the batch with the policy's mode and samples; what was proposed before is sampled again, ever wider."""
        self._learn()
        self._sampled = None
        count = min(self.settings.batch, self._ledger.left)
        self._enter(self._proposal(self.mode()))
        for attempt in range(_TRIES):
            if len(self._planned) >= count:
                return
            rollout = self._sample(count, 1.1**attempt)
            digests = []
            for levels in rollout.taken:
                if len(self._planned) < count:
                    proposal = self._proposal(levels)
                    self._enter(proposal)
                    digests.append(proposal.schedule.digest)
            if attempt == 0:
                self._sampled = rollout.of(range(len(digests))), digests

    def _sample(self, count: int, widening: float = 1.0) -> _Rollout:
        """Episodes of the policy in antithetic pairs; `widening` multiplies σ."""
        half = self._generator.random((-(-count // 2), self._problem.steps))
        return self._roll(np.stack([half, 1 - half], axis=1).reshape(-1, self._problem.steps)[:count], widening)

    def _roll(self, uniform: Floats, widening: float = 1.0, greedy: bool = False) -> _Rollout:
        """Walk episodes to their end, with numbers from [0, 1) that choose, (n, steps), or by the likeliest levels."""
        env = Episodes(self._problem, len(uniform), lambda actions: np.zeros(len(actions)))
        seen, masks, chosen = [env.reset()], [env.masks()], []
        for step in range(self._problem.steps):
            with torch.no_grad():
                given = (masks[-1],) if self.masked else ()
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
        return _Rollout(np.stack(seen), np.stack(masks), np.stack(chosen), env.taken)

    def _learn(self) -> None:
        """If three trials are known, and anything was told since the last time: refit the surrogate, then climb.

        On imagined episodes, and once on the new real ones.
        """
        settings = self.settings
        actions, rewards = self.trials
        if len(rewards) < 3 or len(rewards) == self._learned:
            return
        self._learned = len(rewards)
        rewards = without_outliers(rewards[-settings.memory :])
        self.surrogate.fit(actions[-settings.memory :], rewards)
        left = max(0.0, 1 - self._learned / self._context.budget)
        self._model.ent_coef = settings.entropy * left
        for number in range(settings.rounds):
            rollout = self._sample(settings.imagined)
            mean, deviation = self.surrogate.belief(rollout.taken)
            returns = mean + settings.optimism * left * deviation
            if number == 0 and self._sampled is not None:
                real, digests = self._sampled
                told = [row for row, digest in enumerate(digests) if digest in self.records]
                found = np.array([self.records[digests[row]].rewards[-1] for row in told])
                rollout = rollout.beside(real.of(told))
                returns = np.append(
                    returns, np.where(np.isfinite(found), np.maximum(found, rewards.min()), rewards.min())
                )
            self._train(rollout, returns)
        self._sampled = None

    def _train(self, rollout: _Rollout, returns: Floats) -> None:
        """Gradient steps of the library on finished episodes, (n,) rewards at their last steps."""
        if returns.std() < 1e-12:
            return
        model, (steps, count) = self._model, rollout.chosen.shape
        returns = (returns - returns.mean()) / returns.std()
        given = (torch.from_numpy(rollout.masks).flatten(0, 1),) if self.masked else ()
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
            gae_lambda=self.settings.gae_lambda,
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
                **({"action_masks": rollout.masks[step]} if self.masked else {}),
            )
        buffer.compute_returns_and_advantage(torch.zeros(count), np.ones(count))
        model.rollout_buffer, model.batch_size = buffer, steps * count
        with _own_randomness(int(self._generator.integers(2**31))):
            model.train()


class PpoMasked(Ppo):
    """PPO that gives illegal levels no probability."""

    name = "ppo-masked"
    masked = True


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """The libraries draw from the global generators of torch and numpy: seeded inside, afterwards as they were."""
    before = np.random.get_state()  # noqa: NPY002 - theirs, not ours
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(before)  # noqa: NPY002
