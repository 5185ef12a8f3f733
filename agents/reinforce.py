"""REINFORCE with a learned baseline, warm-started from the closed form. Contains the whole algorithm.

The policy (Williams 1992) chooses one level per step. At step t it keeps the group dense with probability sigmoid(d_t),
else it takes rung l of the ladder with probability ∝ exp(−(o_l − μ_t)² / 2σ_t²), where o_l is the rung's offset and
μ_t = b_t + w·observation_t. It starts with b = w = 0, so its mode, the first proposal, is the closed form.

A trial costs forward passes of a language model, so a few hundred trials must suffice. The baseline is therefore
strong: a critic Q (`agents.surrogate`) that predicts the reward of a whole episode from all trials so far. A baseline
that depends on the actions biases the gradient unless its own gradient is added back, as in Q-Prop (Gu et al. 2017):

    ∇J  =  E[(R − Q) ∇log π] over real episodes  +  E[(Q − mean Q) ∇log π] over imagined episodes.

Imagined episodes cost no trial: the policy samples them in antithetic pairs and the critic scores them. A round of
learning follows every batch. It uses the first term once, while the policy is still the one that made the batch, and
the second term at every gradient step. An entropy bonus that falls to 0 as the budget is spent keeps σ from shrinking
early. Adam makes the steps.

With several evaluators, the reward of an episode may arrive after the policy π has moved on from the policy π' that
made the episode. The episode is then used in the first term of the next round, also once, with the weight
min(1, π / π') (as in V-trace, Espeholt et al. 2018); for an episode whose reward arrives in time, that weight is 1. The
critic uses all trials alike.

Does not know models, and uses only the digests of schedules.
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

_TRIES = 50  # rounds of sampling to fill a batch; if they yield nothing new, the neighbourhood counts as exhausted

Floats = NDArray[np.float64]
Levels = NDArray[np.int64]


@dataclass(frozen=True)
class ReinforceSettings:
    """Settings of REINFORCE; the defaults were chosen on synthetic costs, where halving or doubling changed little."""

    batch: int = 10  # real episodes between two rounds of learning, including the greedy one
    updates: int = 30  # gradient steps per round
    imagined: int = 32  # imagined episodes per gradient step, an even number
    learning_rate: float = 0.03  # of Adam, in log price
    sigma: float = 0.3  # σ at the start, in log price
    smallest_sigma: float = 0.05
    largest_sigma: float = 0.6
    entropy: float = 0.1  # bonus per nat at the start, in standard deviations of the critic's prediction; falls to 0
    dense_groups: float = 0.1  # mean number of groups that an episode keeps dense at the start
    memory: int = 400  # number of latest trials that the critic is fitted to
    survivors: int = 0  # repeats per batch of the trials the critic rates highest; they gave no gain at 4 % noise


@dataclass
class Policy:
    """Sequential policy over (steps, levels). Its parameters are numbers per step and weights on the observation.

    Attributes:
        problem: the problem whose episodes the policy samples.
        rungs: offsets of the ladder, (levels − 1,).
        features: observation at each step after closed-form choices, (steps, k), standardised, and 0 where all steps
            observe the same. The actual prefix matters only for whether dense is legal.
        legal: whether dense is legal at each step if no earlier step chose it, (steps,).
        bias: b, (steps,).
        weights: w, (k,).
        log_sigma: log σ, (steps,).
        dense_logit: d, (steps,).
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
        """Makes the warm start, a policy whose mode is the closed form."""
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
        """Probability of every rung given that the step is not dense, (steps, levels − 1); `widening` multiplies σ."""
        logits = -0.5 * ((self.rungs - self.mean[:, None]) / (widening * np.exp(self.log_sigma)[:, None])) ** 2
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities: Floats = weights / weights.sum(axis=1, keepdims=True)
        return probabilities

    def arrays(self) -> dict[str, Floats]:
        """The parameters by name."""
        return {name: getattr(self, name) for name in ("bias", "weights", "log_sigma", "dense_logit")}

    def mode(self) -> Levels:
        """The greedy episode, (1, steps): the rung nearest to μ, or dense if its probability is above one half."""
        rungs = np.abs(self.rungs - self.mean[:, None]).argmin(axis=1)
        dense = (self.dense_logit > 0)[None]
        return np.where(self._masked(dense)[0], len(self.rungs), rungs[None])

    def sample(
        self, count: int, generator: np.random.Generator, widening: float = 1.0
    ) -> tuple[Levels, NDArray[np.bool_]]:
        """Samples episodes, with the rungs in antithetic pairs; `widening` multiplies σ.

        Returns:
            The episodes and whether dense was legal at each of their steps, (count, steps) each.
        """
        half = generator.random((-(-count // 2), self.problem.steps))
        uniform = np.stack([half, 1 - half], axis=1).reshape(-1, self.problem.steps)[:count]
        below = np.cumsum(self.rung_probabilities(widening), axis=1)[:, :-1]
        rungs = (uniform[:, :, None] > below).sum(axis=2)
        dense, legal = self._masked(generator.random((count, self.problem.steps)) < 1 / (1 + np.exp(-self.dense_logit)))
        return np.where(dense, len(self.rungs), rungs), legal

    def _masked(self, dense: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Drops illegal dense choices.

        Asks the problem only about episodes with dense choices, since masks cost time.

        Args:
            dense: wanted dense choices, (n, steps).

        Returns:
            The legal dense choices and whether dense was legal, (n, steps) each.
        """
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
        """Log-probability of episodes, (n,), given where dense was legal in them, (n, steps)."""
        dense = actions == len(self.rungs)
        rungs = np.log(self.rung_probabilities() + 1e-300)
        taken = rungs[np.arange(self.problem.steps), np.minimum(actions, len(self.rungs) - 1)]
        kept = -np.logaddexp(0.0, self.dense_logit)  # log of the probability of a rung where dense is legal
        by_step = np.where(dense, kept + self.dense_logit, taken + np.where(legal, kept, 0.0))
        probability: Floats = by_step.sum(axis=1)
        return probability

    def entropy_gradient(self) -> Floats:
        """Derivative of the rungs' entropy by log σ, (steps,): ½·Var((o − μ)²/σ²), near 1 within the ladder."""
        squared = ((self.rungs - self.mean[:, None]) / np.exp(self.log_sigma)[:, None]) ** 2
        probabilities = self.rung_probabilities()
        centred = squared - (probabilities * squared).sum(axis=1, keepdims=True)
        gradient: Floats = 0.5 * (probabilities * centred**2).sum(axis=1)
        return gradient

    def climb_(self, gradient: Floats, entropy: float, adam: _Adam, settings: ReinforceSettings) -> None:
        """Makes one gradient step. Removes the mean over the steps of the gradient by μ, as it changes no schedule."""
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
    """Adam (Kingma & Ba 2015) for gradient ascent on one vector, with β₁ = 0.8 and β₂ = 0.95."""

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
        # Samples not learned from yet: where dense was legal, and their log-probability when they were sampled.
        self._sampled: dict[tuple[int, ...], tuple[NDArray[np.bool_], float]] = {}
        self._learned = 0

    def recommend(self, count: int) -> list[Proposal]:
        """See `agents.Agent`. Puts the policy's mode first, then the trials by the reward that the critic predicts."""
        self._learn()
        if not self._learned:
            return self._ledger.best(count)
        return self._distinct(np.vstack([self.policy.mode(), self._believed(self.surrogate)]), count)

    def saved_policy(self) -> SavedPolicy:
        """See `agents.Learner`. Learns from all rewards first; does not save Adam's moments."""
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
        """Fills the batch with the policy's mode and samples; samples again, with larger σ, until enough are new."""
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
        """Refits the critic and improves the policy, if there are three trials and new rewards since the last call."""
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
