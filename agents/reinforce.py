"""REINFORCE over log prices, with a critic learned from slopes and rewards. Contains the whole algorithm.

An action is a vector z of log weights, one for every site: it multiplies the predicted costs by exp(z), and the closed
form is allocated with these. The policy (Williams 1992) is N(μ, V). It starts at μ = 0, so its mode, the first
proposal, is the closed form.

A trial costs passes of a language model, so a few hundred must suffice. The critic Q (`agents.slope_critic`) is fitted
to all slopes and rewards so far and predicts the quality of any z, with its gradient by z. A baseline that depends on
the action biases the policy gradient unless its own gradient is added back, which is exact here since a sample is
z = μ + V^½ ε (Q-Prop, Gu et al. 2017; stochastic value gradients, Heess et al. 2015):

    ∇_μ E[R]  =  E[(R − Q) V⁻¹(z − μ)] over real episodes  +  E[∇_z Q] over imagined episodes.

Proof: the score function gives ∇_μ E[R] = E[R V⁻¹(z − μ)], and by parts E[Q V⁻¹(z − μ)] = E[∇_z Q] under a Gaussian. So
the sum is unbiased for any Q that was not fitted to these real episodes; the critic scores them before it learns from
them. Real episodes come in mirrored pairs z = μ ± V^½ ε that read the same shard, so what a shard adds to all rewards
cancels. The first term is noisy. It enters with the factor max(0, 1 − noise / ‖term‖²) (James & Stein 1961), where the
noise is estimated from how pairs disagree: it counts where the critic is wrong beyond doubt. That factor is the only
bias, and it vanishes as pairs are added.

A round ends with Newton steps on the right side, each shortened until it raises the expectation, with the critic's
curvature H:

    (H + β V⁻¹) Δ  =  gradient − β V⁻¹ (μ − μ_before).

They are cut such that the KL of the new policy from the old one, ½ (μ − μ_before)ᵀ V⁻¹ (μ − μ_before), is at most ε per
site (trust region, Schulman et al. 2015). V then becomes the critic's posterior covariance of the best z, in which
blocks and families move together and each site on top of them, plus σ² I with a σ that falls with every look with
slopes. So the policy explores what is not known yet (guided policy search, Levine & Koltun 2013).

**Looks with and without slopes.** A look with slopes costs `SLOPES_COST` evaluations and is made at the policy's mode,
on a shard that has given few slopes near there. A pair of looks without slopes costs two. Each round buys what the
critic expects to lower its regret more per evaluation.

Asks for the next round without rewards that are still missing; the critic uses them when they arrive, but a pair that
another policy made is not used in the first term. Does not know models; uses the digests and sizes of schedules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from agents.ledger import Ledger
from agents.measured import measured_quality, measured_slopes
from agents.policy_file import SavedPolicy
from agents.protocol import SLOPES_COST, AgentContext, ProblemLike, Proposal
from agents.slope_critic import SlopeCritic
from compression.refusal import Refusal
from compression.schedule import Schedule

__all__ = ["Policy", "Reinforce", "ReinforceSettings", "policy_gradient", "shrunk"]

_TRIES = 30  # rounds of sampling, each wider, until a pair is new; then the neighbourhood counts as exhausted
_FEWEST = 3  # rewards that the policy learns from if there are no slopes

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ReinforceSettings:
    """Settings of REINFORCE."""

    pairs: int = 3  # mirrored pairs of real episodes per round without slopes
    imagined: int = 16  # mirrored pairs of imagined episodes
    updates: int = 4  # Newton steps per round
    trust: float = 0.4  # ε, nats per site
    damping: float = 0.05  # β, as a fraction of the mean of H·V
    sigma: float = 0.15  # part of V that is alike for all sites, in log price, at the start
    slowing: float = 6.0  # number of looks with slopes after which it has halved
    largest_sigma: float = 0.3  # of the part of V that the critic gives
    reach: float = 2.5  # largest |μ|, in log price


@dataclass(frozen=True, eq=False)
class Policy:
    """Gaussian over the log weights of sites.

    Attributes:
        mean: μ, (sites,).
        covariance: V, (sites, sites), positive definite.
    """

    mean: Floats
    covariance: Floats

    def sample(self, pairs: int, generator: np.random.Generator, widening: float = 1.0) -> Floats:
        """Mirrored pairs of actions in neighbouring rows, (2·pairs, sites); `widening` multiplies V^½."""
        noise = generator.standard_normal((pairs, len(self.mean))) @ np.linalg.cholesky(self.covariance).T
        mirrored = np.stack([noise, -noise], axis=1).reshape(2 * pairs, -1)
        return np.asarray(self.mean + widening * mirrored, dtype=np.float64)

    def score(self, actions: Floats) -> Floats:
        """Gradient of the log-probability by μ, (n, sites) -> (n, sites)."""
        return np.asarray(np.linalg.solve(self.covariance, (actions - self.mean).T).T, dtype=np.float64)


def policy_gradient(
    policy: Policy, critic: SlopeCritic, imagined: Floats, actions: Floats, rewards: Floats
) -> tuple[Floats, Floats]:
    """The two terms of the policy gradient, see the module: over real and over imagined episodes, (sites,) each.

    Args:
        imagined: actions sampled from the policy, (m, sites).
        actions: real actions in mirrored pairs, (n, sites).
        rewards: their rewards, (n,); the critic must not have been fitted to them.

    Returns:
        The contributions of single pairs to the first term, (n / 2, sites), whose mean is the term, and the second.
    """
    residuals = (rewards - critic(actions))[:, None] * policy.score(actions)
    return (residuals[::2] + residuals[1::2]) / 2, critic.gradient(imagined)[0].mean(axis=0)


def shrunk(terms: Floats) -> Floats:
    """The mean of independent estimates, (n, sites), times the positive part of 1 − its noise / its square (Stein)."""
    mean: Floats = terms.mean(axis=0)
    noise = float(terms.var(axis=0, ddof=1).sum()) / len(terms)
    return mean * max(0.0, 1 - noise / max(float(mean @ mean), 1e-300))


@dataclass(eq=False)
class _Episode:
    """An action with its measurement: a proposal without reward yet, or with one."""

    action: Floats
    cost: Floats  # predicted, by site
    shard: int
    reward: float = np.nan  # without the term of the size


class Reinforce:
    """See the module."""

    name = "reinforce"

    def __init__(self, problem: ProblemLike, context: AgentContext, settings: ReinforceSettings | None = None) -> None:
        self.settings = settings or ReinforceSettings()
        self.critic = SlopeCritic(problem, context.shards)
        self._problem, self._context = problem, context
        self._generator = np.random.default_rng(context.seed)
        self._ledger = Ledger(context)
        self._planned: list[Proposal] = []
        self._open: dict[tuple[str, int], _Episode] = {}
        self._pairs: list[tuple[_Episode, _Episode]] = []  # those that the present policy made
        self._news: list[_Episode] = []  # episodes that the critic does not know yet
        self._mirrored = 0  # pairs made so far
        self._known = 0  # what the critic knew in the last round
        self._modes: list[Floats] = []
        self.policy = Policy(np.zeros(len(problem.sites)), self._covariance())
        if context.policy is not None:
            self.policy = Policy(**self._restored(context.policy))

    def ask(self, count: int) -> list[Proposal]:
        """See `agents.Agent`."""
        self._ledger.check(count)
        if not self._planned and self._ledger.left:
            self._plan()
        given, self._planned = self._planned[:count], self._planned[count:]
        return given

    def tell_slopes(self, proposal: Proposal, slopes: Mapping[str, float]) -> None:
        """See `agents.SlopeAgent`. A site whose slope is missing or not finite counts as not measured."""
        assert proposal.probe is not None
        shard = self._context.shard(proposal.schedule, proposal.repeat)
        self.critic.add_slopes(shard, *measured_slopes(self._problem, proposal.schedule, proposal.probe, slopes))

    def tell(self, proposals: Sequence[Proposal], rewards: Sequence[float]) -> None:
        """See `agents.Agent`."""
        self._ledger.close(proposals, rewards)
        for proposal, reward in zip(proposals, rewards, strict=True):
            episode = self._open.pop((proposal.schedule.digest, proposal.repeat))
            episode.reward = measured_quality(self._problem, self._context, proposal, reward)
            self._news.append(episode)

    def recommend(self, count: int) -> list[Proposal]:
        """See `agents.Agent`.

        Puts the mean over the second half of the rounds of the policy's mode first (Polyak & Juditsky 1992), then the
        modes, the latest first, then the trials of highest reward.
        """
        self._learn()
        if not self._modes:
            return self._ledger.best(count)
        late = np.mean(self._modes[len(self._modes) // 2 :], axis=0)
        found = {one.digest: Proposal(one, None) for one in map(self._schedule, (late, *self._modes[::-1]))}
        for proposal in self._ledger.best(count):
            found.setdefault(proposal.schedule.digest, Proposal(proposal.schedule, None))
        return list(found.values())[:count]

    def saved_policy(self) -> SavedPolicy:
        """See `agents.Learner`. Learns from all rewards first; does not save what the critic knows."""
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

    def _arrays(self) -> dict[str, Floats]:
        return {"mean": self.policy.mean, "covariance": self.policy.covariance}

    def _restored(self, saved: SavedPolicy) -> dict[str, Floats]:
        """The arrays of a saved policy.

        Raises:
            Refusal: as `SavedPolicy.restore`, or the policy is of the earlier agent of this name.
        """
        if saved.agent == self.name and "bias" in saved.arrays:
            raise Refusal(
                "the policy was learned by an earlier reinforce, which chose levels of steps, and cannot be continued; "
                "start from the prior.json of its run with --prior"
            )
        names, offsets = self._problem.names, self._problem.offsets
        return saved.restore(self.name, self._context.model, names, offsets, self._arrays())

    def _schedule(self, action: Floats) -> Schedule:
        return self._problem.weighted(np.zeros(self._problem.steps), action)

    def _covariance(self) -> Floats:
        """V: the critic's covariance of log ω, within the limits of σ."""
        settings, found = self.settings, self.critic.covariance
        widest = float(np.sqrt(np.diag(found).max()))
        shrunk = found * min(1.0, settings.largest_sigma / widest) ** 2
        sigma = settings.sigma / (1 + self.critic.passes / settings.slowing)
        covariance: Floats = shrunk + sigma**2 * np.eye(len(found))
        return covariance

    def _plan(self) -> None:
        """Buys a look with slopes at the mode or pairs without, whichever the critic expects to be worth more."""
        self._learn()
        worth, shards = self.critic.worth_of_slopes()
        pairs = self._problem.tradeoff(self.policy.sample(4, self._generator)).cost
        sloped = not self.critic.passes or worth > self.critic.worth_of_looks(pairs)
        if sloped and self._look(self.policy.mean, shards, slopes=True) is not None:
            return
        for _ in range(self.settings.pairs):
            self._look_both_ways()

    def _look_both_ways(self) -> None:
        """Plans a mirrored pair on one shard; samples again, wider, until both schedules are new on that shard."""
        shard = self._mirrored % self._context.shards
        for attempt in range(_TRIES):
            actions = self.policy.sample(1, self._generator, 1.1**attempt)
            pair = [episode for action in actions if (episode := self._look(action, [shard])) is not None]
            if len(pair) == 2 and not attempt:
                self._pairs.append((pair[0], pair[1]))
            if pair:  # of a pair, one may be known on this shard already, or too dear
                self._mirrored += 1
                return

    def _look(self, action: Floats, shards: Iterable[int], slopes: bool = False) -> _Episode | None:
        """Plans a measurement of an action on the first shard where it is new; None if there is none.

        If the rest of the budget does not pay for slopes, the same measurement is made without, so that a search with
        a larger budget proposes the same schedules in the same order.
        """
        schedule = self._schedule(action)
        probe = self._problem.probe(schedule) if slopes and self._ledger.left >= SLOPES_COST else None
        for shard in shards if self._ledger.left else ():
            proposal = Proposal(schedule, None, self._context.repeat(schedule, shard), probe)
            if self._ledger.add(proposal):
                self._planned.append(proposal)
                episode = _Episode(action, self._problem.costs(schedule), shard)
                self._open[schedule.digest, proposal.repeat] = episode
                return episode
        return None

    def _learn(self) -> None:
        """Refits the critic and improves the policy, if there are rewards since the last call."""
        if not self._news:
            return
        paid = self._paid_back()
        for episode in self._news:
            self.critic.add_quality(episode.shard, episode.cost, episode.reward)
        self._news, self._pairs = [], []
        if self.critic.known == self._known or not (self.critic.passes or self.critic.known >= _FEWEST):
            return  # all failed, or too little is known
        self._known = self.critic.known
        self.critic.fit(self.policy.mean)
        self._improve(paid)
        self._modes.append(self.policy.mean)

    def _paid_back(self) -> Floats:
        """The first term of the policy gradient, shrunk by its noise; 0 before two pairs have their rewards."""
        told = [pair for pair in self._pairs if all(np.isfinite(one.reward) for one in pair)]
        if len(told) < 2:
            return np.zeros_like(self.policy.mean)
        actions = np.stack([one.action for pair in told for one in pair])
        rewards = np.array([one.reward for pair in told for one in pair])
        terms, _ = policy_gradient(self.policy, self.critic, actions, actions, rewards)
        return shrunk(terms)

    def _improve(self, paid: Floats) -> None:
        """Makes the Newton steps of a round; see the module."""
        settings, before = self.settings, self.policy
        deviations = before.sample(settings.imagined, self._generator) - before.mean
        mean = before.mean
        value = self._expected(mean, deviations, paid)
        for _ in range(settings.updates):
            gradient, curvature = (one.mean(axis=0) for one in self.critic.gradient(mean + deviations))
            beta = settings.damping * float((curvature * np.diag(before.covariance)).mean()) + 1e-12
            system = before.covariance * curvature + beta * np.eye(len(mean))
            step = np.linalg.solve(system, before.covariance @ (gradient + paid) - beta * (mean - before.mean))
            for shorter in (1.0, 0.5, 0.25, 0.125):
                tried = self._expected(mean + shorter * step, deviations, paid)
                if tried > value:
                    mean, value = mean + shorter * step, tried
                    break
            else:
                break
        moved = mean - before.mean
        moved -= moved.mean()
        divergence = 0.5 * float(moved @ np.linalg.solve(before.covariance, moved)) / len(moved)
        moved *= min(1.0, np.sqrt(settings.trust / max(divergence, 1e-12)))
        mean = np.clip(before.mean + moved, -settings.reach, settings.reach)
        self.policy = Policy(mean, self._covariance())

    def _expected(self, mean: Floats, deviations: Floats, paid: Floats) -> float:
        """Expected quality of a policy with this mean, by imagined episodes, with the first term of the gradient."""
        return float(self.critic(mean + deviations).mean()) + float(paid @ mean)
