"""PPO over the levels of an episode, on top of what slopes say of single sites. Contains all but the gradient steps.

The gradient steps are `train()` of stable-baselines3's PPO and sb3-contrib's MaskablePPO (Schulman et al. 2017; masks
as in Huang & Ontañón 2022), with generalised advantages from a value network (Schulman et al. 2016), normalised per
batch. Their `learn()` is not used, since it counts its own steps and would spend any budget. This module collects the
episodes and fills the rollout buffers when the rewards are known.

The levels of an episode multiply the predicted costs of blocks and families. Single sites have residual log weights
besides. Whenever the policy learns, these go a part of the way to what the critic below believes best, without what
blocks and families can express. They start at 0, and stay there without slopes.

The policy reads the problem's observation and the index of the step, and outputs three numbers: μ, log σ and d. It
takes dense with probability sigmoid(d), else rung l with probability ∝ exp(−(o_l − μ)² / 2σ²), where o_l is the rung's
offset. It starts with μ = 0 at every step, so its mode, the first proposal, is the closed form. (With a free logit per
level, a policy learns nothing from one rung about its neighbours; on synthetic costs it found half the gain.)

A trial costs forward passes of a language model, so a few hundred trials must suffice. Between two batches of trials,
the policy learns from several rounds of imagined episodes, and in the first round also from its own new trials with
their true rewards. The quality of an imagined episode is predicted by the critic of `reinforce`, which is fitted to all
slopes and rewards so far around the policy's mode (`agents.slope_critic`), and by a Gaussian process that is fitted to
what the critic does not explain (`agents.surrogate`). A multiple of the process's standard deviation is added that
falls to 0 as the budget is spent, so that uncertain episodes are tried (upper confidence bounds, Srinivas et al. 2010).

A batch is either one look with slopes at the policy's mode, which costs `SLOPES_COST` evaluations, or the mode and
samples without slopes, whichever the critic expects to lower its regret more per evaluation.

`ppo` may choose dense where it is illegal; the highest rung is then taken instead, as in `envs.BondDimensionEnv`.
`ppo-masked` gives illegal levels no probability. Does not know models, and uses only the digests of schedules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger

from agents.batch_agent import BatchAgent
from agents.measured import measured_quality, measured_slopes
from agents.policy_file import SavedPolicy
from agents.protocol import SLOPES_COST, AgentContext, ProblemLike, Proposal
from agents.sb3_episodes import Episodes
from agents.slope_critic import SlopeCritic
from agents.surrogate import Surrogate, without_outliers

__all__ = ["Ppo", "PpoMasked", "PpoSettings"]

_FEWEST = 3  # trials that are learned from if there are no slopes
_RESIDUALS = "residuals"  # name of their array in a saved policy
_TRIES = 50  # rounds of sampling to fill a batch; if they yield nothing new, the neighbourhood counts as exhausted

Floats = NDArray[np.float64]
Levels = NDArray[np.int64]


@dataclass(frozen=True)
class PpoSettings:
    """Settings of PPO; the defaults were chosen on synthetic costs of 37 steps with 4 % noise and 200 trials.

    There the recommendation's true cost was 0.86 of the closed form's without imagined episodes, 0.83 with them, and
    0.80 with optimism as well (three seeds), before the critic took part.
    """

    batch: int = 10  # real episodes between two learning phases, including the greedy one
    rounds: int = 3  # imagined rollouts per learning phase
    imagined: int = 96  # episodes per imagined rollout, an even number
    epochs: int = 10  # gradient steps per rollout
    optimism: float = 1.0  # standard deviations of the surrogate added to its mean at the start; falls to 0
    learning_rate: float = 0.03  # of Adam
    clip: float = 0.2  # PPO's clipping range for the probability ratio
    entropy: float = 0.01  # bonus per nat and step at the start; falls to 0
    gae_lambda: float = 0.95  # λ of the generalised advantages; 1 uses the reward alone, less the value network more
    hidden: int = 32  # hidden units of the value network
    sigma: float = 0.3  # σ at the start, in log price
    smallest_sigma: float = 0.05
    largest_sigma: float = 0.6
    dense_groups: float = 0.1  # mean number of groups that an episode keeps dense at the start
    memory: int = 400  # number of latest trials that the surrogate is fitted to
    rate: float = 0.4  # part of the way to the critic's belief that residuals go, with few looks with slopes
    slowing: float = 6.0  # number of those after which it has halved
    trust: float = 0.1  # largest move of a residual, in log price: the critic is to be believed only nearby
    reach: float = 2.5  # largest residual


class _Ladder(torch.nn.Module):
    """Maps observations to logits of the levels, (n, entries) -> (n, levels); μ, log σ and d are linear in them."""

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
        seen: observations, (steps, n, entries).
        masks: whether each level was legal, (steps, n, levels).
        chosen: levels chosen by the policy, (steps, n).
        taken: levels after illegal ones were replaced, (n, steps).
    """

    seen: NDArray[np.float32]
    masks: NDArray[np.bool_]
    chosen: Levels
    taken: Levels

    def of(self, rows: Sequence[int]) -> _Rollout:
        """Returns the episodes with these indices."""
        return _Rollout(self.seen[:, rows], self.masks[:, rows], self.chosen[:, rows], self.taken[rows])

    def beside(self, other: _Rollout) -> _Rollout:
        """Returns these episodes followed by those of `other`."""
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
        self.critic = SlopeCritic(problem, context.shards)
        top = problem.offsets[-2]
        # Log weight of every level; dense is a step above the highest rung.
        self._positions = np.append(problem.offsets[:-1], 2 * top - problem.offsets[-3])
        self._episodes: dict[str, tuple[int, ...]] = {}  # levels of every proposal, by the schedule's digest
        self._residuals: Floats = np.zeros(len(problem.sites))
        left, size, _ = np.linalg.svd(problem.membership, full_matrices=False)
        self._expressed = left[:, size > 1e-9 * size[0]]  # orthonormal basis of what the steps can express
        with _own_randomness(context.seed):
            self._model = self._build()
        if context.policy is not None:
            arrays = context.policy.restore(self.name, context.model, problem.names, problem.offsets, self._arrays())
            self._residuals = arrays.pop(_RESIDUALS)
            self._model.policy.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
        self._here = problem.around(np.zeros(problem.steps), self._residuals)
        # The samples of the policy in this batch, and the digests of their schedules.
        self._sampled: tuple[_Rollout, list[str]] | None = None
        self._learned = 0  # what the critic knew when the policy learned
        self._known = 0  # number of trials that the surrogate knew
        self._looks = 0  # looks with slopes that were planned

    def tell_slopes(self, proposal: Proposal, slopes: Mapping[str, float]) -> None:
        """See `agents.SlopeAgent`. A site whose slope is missing or not finite counts as not measured."""
        assert proposal.probe is not None
        shard = self._context.shard(proposal.schedule, proposal.repeat)
        self.critic.add_slopes(shard, *measured_slopes(self._problem, proposal.schedule, proposal.probe, slopes))

    def tell(self, proposals: Sequence[Proposal], rewards: Sequence[float]) -> None:
        """See `agents.Agent`."""
        super().tell(proposals, rewards)
        for proposal, reward in zip(proposals, rewards, strict=True):
            shard = self._context.shard(proposal.schedule, proposal.repeat)
            quality = measured_quality(self._problem, self._context, proposal, reward)
            self.critic.add_quality(shard, self._problem.costs(proposal.schedule), quality)

    def recommend(self, count: int) -> list[Proposal]:
        """See `agents.Agent`.

        Puts the policy's mode first, then the episodes of trials by predicted quality, with the present residuals.
        """
        self._learn()
        if not self._learned:
            return self._ledger.best(count)
        return self._distinct(np.vstack([self.mode(), self._believed(lambda levels: self._belief(levels)[0])]), count)

    def mode(self) -> Levels:
        """The greedy episode, (steps,)."""
        levels: Levels = self._roll(np.zeros((1, 0)), greedy=True).taken[0]
        return levels

    def saved_policy(self) -> SavedPolicy:
        """See `agents.Learner`. Learns from all rewards first; saves policy and value network, not Adam's moments."""
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
        """Makes the library's algorithm with our policy head and a separate value network."""
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
        learned = {name: values.numpy().copy() for name, values in self._model.policy.state_dict().items()}
        return {**learned, _RESIDUALS: self._residuals}

    def _plan(self) -> None:
        """Fills the batch with a look with slopes at the policy's mode, or with the mode and samples.

        Samples again, with larger σ, until enough are new.
        """
        self._learn()
        self._sampled = None
        if self._look_with_slopes():
            return
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

    def _levels_of(self, proposal: Proposal) -> tuple[int, ...]:
        return self._episodes[proposal.schedule.digest]

    def _proposal(self, levels: Levels) -> Proposal:
        taken = tuple(levels.tolist())
        proposal = Proposal(self._here.schedule(taken), None)
        self._episodes.setdefault(proposal.schedule.digest, taken)
        return proposal

    def _look_with_slopes(self) -> bool:
        """Plans slopes at the policy's mode if they are worth more than samples; whether it did."""
        if self._looks >= 2 * (self.critic.passes + 1):  # half of them failed
            return False
        worth, shards = self.critic.worth_of_slopes()
        if self.critic.passes and worth <= self.critic.worth_of_looks(self._places(self._sample(8).taken)):
            return False
        proposal = self._proposal(self.mode())
        # If the rest of the budget does not pay for slopes, the same measurement is made without.
        probe = self._problem.probe(proposal.schedule) if self._ledger.left >= SLOPES_COST else None
        repeats = (self._context.repeat(proposal.schedule, shard) for shard in shards)
        planned = any(self._enter(replace(proposal, repeat=repeat, probe=probe)) for repeat in repeats)
        self._looks += planned
        return planned

    def _places(self, levels: Levels) -> Floats:
        """Log weights of the sites in episodes, (n, steps) -> (n, sites)."""
        places: Floats = self._positions[levels] @ self._problem.membership.T + self._residuals
        return places

    def _unexpressed(self, log_weights: Floats) -> Floats:
        """What the steps cannot express of log weights, (sites,)."""
        rest: Floats = log_weights - self._expressed @ (self._expressed.T @ log_weights)
        return rest

    def _depart(self) -> None:
        """Moves the residuals towards the critic's belief, without what the steps can express."""
        settings, here = self.settings, self._places(self.mode()[None])[0]
        self.critic.fit(here)
        rate = settings.rate / (1 + self.critic.passes / settings.slowing)
        step = np.clip(rate * self._unexpressed(self.critic.log_weights - here), -settings.trust, settings.trust)
        moved = self._residuals + self._unexpressed(step)
        self._residuals = np.clip(moved, -settings.reach, settings.reach)
        self._here = self._problem.around(np.zeros(self._problem.steps), self._residuals)

    def _belief(self, levels: Levels) -> tuple[Floats, Floats]:
        """Predicted quality of episodes and its standard deviation, (n, steps) -> (n,), (n,)."""
        predicted = self.critic(self._places(levels))
        if self._known < _FEWEST:
            return predicted, np.zeros(len(levels))
        mean, deviation = self.surrogate.belief(levels)
        return predicted + mean, deviation

    def _sample(self, count: int, widening: float = 1.0) -> _Rollout:
        """Samples episodes from the policy in antithetic pairs; `widening` multiplies σ."""
        half = self._generator.random((-(-count // 2), self._problem.steps))
        return self._roll(np.stack([half, 1 - half], axis=1).reshape(-1, self._problem.steps)[:count], widening)

    def _roll(self, uniform: Floats, widening: float = 1.0, greedy: bool = False) -> _Rollout:
        """Runs n episodes: takes the likeliest levels, or samples by the numbers `uniform` in [0, 1), (n, steps)."""
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
        """Refits critic and surrogate and trains the policy, if enough is known and more than at the last call.

        The policy trains on imagined episodes, and in the first round on the new real ones too.
        """
        settings, known = self.settings, self.critic.known
        actions, rewards = self.trials
        if known == self._learned or not (self.critic.passes or known >= _FEWEST):
            return
        self._learned, self._known = known, len(rewards)
        if self.critic.passes:
            self._depart()
        self.critic.fit(self._places(self.mode()[None])[0])
        # The size adds the same to all rewards, but for less than a step of χ.
        rewards = rewards - self._context.compression_weight * (1 - self._problem.target_kept)
        actions, rewards = actions[-settings.memory :], without_outliers(rewards[-settings.memory :])
        if self._known >= _FEWEST:
            self.surrogate.fit(actions, rewards - self.critic(self._places(actions)))
        left = max(0.0, self._ledger.left / max(1, self._context.budget))
        self._model.ent_coef = settings.entropy * left
        for number in range(settings.rounds):
            rollout = self._sample(settings.imagined)
            mean, deviation = self._belief(rollout.taken)
            returns = mean + settings.optimism * left * deviation
            if number == 0 and self._sampled is not None:
                real, digests = self._sampled
                told = [row for row, digest in enumerate(digests) if digest in self.records]
                found = np.array([self.records[digests[row]].rewards[-1] for row in told])
                found = found - self._context.compression_weight * (1 - self._problem.target_kept)
                rollout = rollout.beside(real.of(told))
                returns = np.append(
                    returns, np.where(np.isfinite(found), np.maximum(found, rewards.min()), rewards.min())
                )
            self._train(rollout, returns)
        self._sampled = None

    def _train(self, rollout: _Rollout, returns: Floats) -> None:
        """Makes the library's gradient steps on finished episodes; `returns`, (n,), are paid at their last steps."""
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
    """Seeds the global generators of torch and NumPy, from which the libraries draw, and restores them at the end."""
    before = np.random.get_state()  # noqa: NPY002 - the libraries use the global generator
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(before)  # noqa: NPY002
