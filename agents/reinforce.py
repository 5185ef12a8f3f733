"""REINFORCE with a learned baseline, warm-started from the closed form: the whole algorithm, top to bottom.

The policy (Williams 1992) walks over the steps. At step t it keeps the group dense with probability sigmoid(d_t), else
it takes rung l of the ladder with probability ∝ exp(−(o_l − μ_t)² / 2σ_t²), where o_l is the rung's offset and
μ_t = b_t + w·observation_t. It starts at b = w = 0: its mode is the closed-form allocation, the first proposal.

A trial costs forward passes of a language model, so a few hundred must do. The baseline is therefore strong: a critic
Q, see `agents.surrogate`, that predicts the reward of a whole episode from all trials so far. A baseline that depends
on the actions is biased unless its own gradient is paid back, as in Q-Prop (Gu et al. 2017):

    ∇J  =  E[(R − Q) ∇log π] over real episodes  +  E[(Q − mean Q) ∇log π] over imagined episodes.

Imagined episodes cost no trial: the policy samples them in antithetic pairs and the critic scores them. A round of
learning follows every batch; it takes the first term once, while the policy is still the one that made the batch, and
the second at every gradient step. An entropy bonus that fades with the budget keeps σ up. Adam climbs.

With several evaluators an episode may be told after the policy has moved on from the one π' that made it. It is then
used once, as ever, in the first term of the next round, with the weight min(1, π / π') (as in V-trace, Espeholt et al.
2018); of an episode told in time that is 1. The critic takes all trials alike.

Knows nothing of models, and of schedules only that they have a digest.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from agents.batch_agent import BatchAgent
from agents.policy_file import SavedPolicy
from agents.protocol import AgentContext, ProblemLike, Proposal
from agents.surrogate import Surrogate, without_outliers

__all__ = ["Policy", "Reinforce", "ReinforceSettings"]

_TRIES = 50  # samplings for a schedule not proposed before; then the neighbourhood counts as exhausted

Floats = NDArray[np.float64]
Levels = NDArray[np.int64]


@dataclass(frozen=True)
class ReinforceSettings:
    """What can be tuned; the defaults were set on synthetic costs, where halving or doubling one changed little."""

    batch: int = 10  # real episodes between two rounds of learning, the greedy one included
    updates: int = 30  # gradient steps in a round
    imagined: int = 32  # imagined episodes behind a gradient step, even
    learning_rate: float = 0.03  # Adam's, in log price
    sigma: float = 0.3  # exploration at the start, in log price
    smallest_sigma: float = 0.05
    largest_sigma: float = 0.6
    entropy: float = 0.1  # bonus per nat at the start, in standard deviations of the critic's prediction; falls to 0
    dense_groups: float = 0.1  # groups an episode keeps dense on average at the start
    memory: int = 400  # the critic remembers this many latest trials
    survivors: int = 0  # of a batch: further looks at the trials the critic expects most of; no gain at 4 % noise


@dataclass
class Policy:
    """Sequential policy over (steps, levels). Parameters are numbers per step, plus weights on the observation.

    Attributes:
        rungs: offsets of the ladder, (levels − 1,).
        features: what a step sees while the episode so far follows the closed form, (steps, k), standardised, and 0
            where all see the same; the actual prefix enters only through the mask of dense.
        legal: whether dense is legal at a step while no earlier step took it, (steps,).
    """

    problem: ProblemLike
    rungs: Floats
    features: Floats
    legal: NDArray[np.bool_]
    bias: Floats
    weights: Floats
    log_sigma: Floats
    dense_logit: Floats

    @classmethod
    def build(cls, problem: ProblemLike, settings: ReinforceSettings) -> Policy:
        """The warm start: mode is the closed form."""
        prefixes = [(problem.middle,) * step for step in range(problem.steps)]
        seen = np.array([problem.observation(prefix) for prefix in prefixes], dtype=np.float64)
        spread = seen.std(axis=0)
        varies = spread > 1e-6
        features = np.where(varies, seen - seen.mean(axis=0), 0.0) / np.where(varies, spread, 1.0)
        chance = min(0.5, settings.dense_groups / problem.steps)
        return cls(
            problem=problem,
            rungs=np.asarray(problem.offsets[:-1], dtype=np.float64),
            features=features / max(1.0, np.sqrt(varies.sum())),
            legal=np.array([problem.mask(prefix)[-1] for prefix in prefixes]),
            bias=np.zeros(problem.steps),
            weights=np.zeros(features.shape[1]),
            log_sigma=np.full(problem.steps, np.log(settings.sigma)),
            dense_logit=np.full(problem.steps, np.log(chance / (1 - chance))),
        )

    @property
    def mean(self) -> Floats:
        """μ, (steps,)."""
        return self.bias + self.features @ self.weights

    def rung_probabilities(self, widening: float = 1.0) -> Floats:
        """Of every rung given that the step is not dense, (steps, levels − 1); `widening` multiplies σ."""
        logits = -0.5 * ((self.rungs - self.mean[:, None]) / (widening * np.exp(self.log_sigma)[:, None])) ** 2
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities: Floats = weights / weights.sum(axis=1, keepdims=True)
        return probabilities

    def arrays(self) -> dict[str, Floats]:
        """The parameters by name."""
        return {name: getattr(self, name) for name in ("bias", "weights", "log_sigma", "dense_logit")}

    def mode(self) -> Levels:
        """The greedy episode, (1, steps): the rung next to the mean, or dense where that is more likely than not."""
        rungs = np.abs(self.rungs - self.mean[:, None]).argmin(axis=1)
        dense = (self.dense_logit > 0)[None]
        return np.where(self._masked(dense)[0], len(self.rungs), rungs[None])

    def sample(
        self, count: int, generator: np.random.Generator, widening: float = 1.0
    ) -> tuple[Levels, NDArray[np.bool_]]:
        """Episodes (count, steps), rungs in antithetic pairs, and whether dense was legal at each of their steps.

        `widening` multiplies σ.
        """
        half = generator.random((-(-count // 2), self.problem.steps))
        uniform = np.stack([half, 1 - half], axis=1).reshape(-1, self.problem.steps)[:count]
        below = np.cumsum(self.rung_probabilities(widening), axis=1)[:, :-1]
        rungs = (uniform[:, :, None] > below).sum(axis=2)
        dense, legal = self._masked(generator.random((count, self.problem.steps)) < 1 / (1 + np.exp(-self.dense_logit)))
        return np.where(dense, len(self.rungs), rungs), legal

    def _masked(self, dense: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Dense steps without the illegal ones, and where dense is legal; asks the task only where some are."""
        legal = np.tile(self.legal, (len(dense), 1))
        dense = dense & legal
        rows = np.flatnonzero(dense.any(axis=1))
        if len(rows):
            levels = np.full((len(rows), self.problem.steps), self.problem.middle)
            for step in range(self.problem.steps):
                legal[rows, step] = self.problem.mask(levels[:, :step])[:, -1]
                dense[rows, step] &= legal[rows, step]
                levels[dense[rows, step], step] = len(self.rungs)
        return dense, legal

    def score(self, actions: Levels, legal: NDArray[np.bool_], advantages: Floats) -> Floats:
        """Mean over episodes of advantage·∇log π with respect to μ (times σ), log σ and d, (3, steps)."""
        sigma, mean = np.exp(self.log_sigma), self.mean
        probabilities = self.rung_probabilities()
        distance = (self.rungs - mean[:, None]) / sigma[:, None]
        dense = actions == len(self.rungs)
        taken = (self.rungs[np.minimum(actions, len(self.rungs) - 1)] - mean) / sigma
        first = np.where(dense, 0.0, taken - (probabilities * distance).sum(axis=1))
        second = np.where(dense, 0.0, taken**2 - (probabilities * distance**2).sum(axis=1))
        third = np.where(legal, dense - 1 / (1 + np.exp(-self.dense_logit)), 0.0)
        weight = advantages / len(actions)
        return np.stack([weight @ first, weight @ second, weight @ third])

    def log_probability(self, actions: Levels, legal: NDArray[np.bool_]) -> Floats:
        """Of episodes, (n,), given where dense was legal in them."""
        dense = actions == len(self.rungs)
        rungs = np.log(self.rung_probabilities() + 1e-300)
        taken = rungs[np.arange(self.problem.steps), np.minimum(actions, len(self.rungs) - 1)]
        kept = -np.logaddexp(0.0, self.dense_logit)  # log of the probability of a rung where dense is legal
        by_step = np.where(dense, kept + self.dense_logit, taken + np.where(legal, kept, 0.0))
        probability: Floats = by_step.sum(axis=1)
        return probability

    def entropy_gradient(self) -> Floats:
        """Of the rungs' entropy by log σ, (steps,): ½·Var((o − μ)²/σ²), near 1 far from the ladder's ends."""
        squared = ((self.rungs - self.mean[:, None]) / np.exp(self.log_sigma)[:, None]) ** 2
        probabilities = self.rung_probabilities()
        centred = squared - (probabilities * squared).sum(axis=1, keepdims=True)
        gradient: Floats = 0.5 * (probabilities * centred**2).sum(axis=1)
        return gradient

    def climb_(self, gradient: Floats, entropy: float, adam: _Adam, settings: ReinforceSettings) -> None:
        """One step up. A constant on all offsets changes no schedule and is taken out."""
        centre = gradient[0] - gradient[0].mean()
        spread = gradient[1] + entropy * self.entropy_gradient()
        step = adam.step(np.concatenate([centre, self.features.T @ centre, spread, gradient[2]]))
        bias, weights, log_sigma, dense = np.split(
            step, np.cumsum([self.problem.steps, self.features.shape[1], self.problem.steps])
        )
        self.bias = np.clip(self.bias + bias, self.rungs[0], self.rungs[-1])
        self.weights = self.weights + weights
        limits = np.log(settings.smallest_sigma), np.log(settings.largest_sigma)
        self.log_sigma = np.clip(self.log_sigma + log_sigma, *limits)
        self.dense_logit = np.clip(self.dense_logit + dense, -10.0, 10.0)


@dataclass
class _Adam:
    """Adam (Kingma & Ba 2015), ascending, on one vector."""

    rate: float
    first: Floats | float = 0.0
    second: Floats | float = 0.0
    count: int = 0

    def step(self, gradient: Floats) -> Floats:
        self.count += 1
        self.first = 0.8 * self.first + 0.2 * gradient
        self.second = 0.95 * self.second + 0.05 * gradient**2
        mean = self.first / (1 - 0.8**self.count)
        return np.asarray(self.rate * mean / (np.sqrt(self.second / (1 - 0.95**self.count)) + 1e-3))


class Reinforce(BatchAgent):
    """See the module."""

    name = "reinforce"

    def __init__(self, problem: ProblemLike, context: AgentContext, settings: ReinforceSettings | None = None) -> None:
        super().__init__(problem, context)
        self.settings = settings or ReinforceSettings()
        self.policy = Policy.build(problem, self.settings)
        if context.policy is not None:
            start = context.policy.restore(
                self.name, context.model, problem.names, problem.offsets, self.policy.arrays()
            )
            for name, values in start.items():
                setattr(self.policy, name, values)
        self.surrogate = Surrogate(problem)
        self._adam = _Adam(self.settings.learning_rate)
        # Samples not learned from yet: where dense was legal in them, and their log-probability under their policy.
        self._sampled: dict[tuple[int, ...], tuple[NDArray[np.bool_], float]] = {}
        self._learned = 0

    def recommend(self, count: int) -> list[Proposal]:
        """See `agents.Agent`. The policy's mode, then the trials of which the critic expects most."""
        self._learn()
        if not self._learned:
            return self._ledger.best(count)
        return self._distinct(np.vstack([self.policy.mode(), self._believed(self.surrogate)]), count)

    def saved_policy(self) -> SavedPolicy:
        """See `agents.Learner`. Without Adam's moments; what was told is learned first."""
        self._learn()
        return SavedPolicy(
            agent=self.name,
            model=self._context.model,
            target_kept=self._problem.target_kept,
            steps=self._problem.names,
            rungs=tuple(self.policy.rungs.tolist()),
            settings=asdict(self.settings),
            arrays=self.policy.arrays(),
        )

    def _plan(self) -> None:
        """Fill the batch with the policy's mode and samples; what was proposed before is sampled again, ever wider."""
        self._learn()
        count = min(self.settings.batch, self._ledger.left)
        self._enter(self._proposal(self.policy.mode()[0]))
        if self._learned:
            for levels in self._believed(self.surrogate)[: min(self.settings.survivors, count - len(self._planned))]:
                proposal = self._proposal(levels)
                self._enter(replace(proposal, repeat=len(self.record(proposal).rewards)))
        for attempt in range(_TRIES):
            if len(self._planned) >= count:
                return
            actions, legal = self.policy.sample(2 * (-(-count // 2)), self._generator, 1.1**attempt)
            chance = self.policy.log_probability(actions, legal)
            for row in range(len(actions)):
                if len(self._planned) < count and self._enter(self._proposal(actions[row])) and not attempt:
                    self._sampled[tuple(actions[row].tolist())] = legal[row], float(chance[row])

    def _learn(self) -> None:
        """One round, if three trials are known and anything was told since the last one.

        Refit the critic on all trials, then climb.
        """
        settings = self.settings
        actions, rewards = self.trials
        if len(rewards) < 3 or len(rewards) == self._learned:
            return
        self._learned = len(rewards)
        actions, rewards = actions[-settings.memory :], rewards[-settings.memory :]
        remembered = [tuple(levels) for levels in actions.tolist()]
        residuals = self.surrogate.fit(actions, without_outliers(rewards))
        entropy = settings.entropy * max(0.0, 1 - self._learned / self._context.budget)
        real = [row for row, levels in enumerate(remembered) if levels in self._sampled]
        for update in range(settings.updates):
            imagined, legal = self.policy.sample(settings.imagined, self._generator)
            returns = self.surrogate(imagined)
            spread = float(returns.std()) + 1e-12
            gradient = self.policy.score(imagined, legal, (returns - returns.mean()) / spread)
            if real and update == 0:
                legal = np.array([self._sampled[remembered[row]][0] for row in real])
                before = np.array([self._sampled[remembered[row]][1] for row in real])
                weight = np.exp(np.minimum(0.0, self.policy.log_probability(actions[real], legal) - before))
                gradient = gradient + self.policy.score(actions[real], legal, weight * residuals[real] / spread)
            self.policy.climb_(gradient, entropy, self._adam, settings)
        for row in real:
            self._sampled.pop(remembered[row], None)
