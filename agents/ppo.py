"""PPO over the levels of an episode, on top of what slopes say of single sites.

The levels of an episode multiply the predicted costs of blocks and families (`agents.ladder_policy` chooses them).
Single sites have residual log weights besides. Whenever the policy learns, these go a part of the way to what the
critic below believes best, without what blocks and families can express. They start at 0, and stay there without
slopes.

A trial costs forward passes of a language model, so a few hundred trials must suffice. The policy therefore learns from
imagined episodes alone (model-based policy optimisation, Janner et al. 2019). The critic of `reinforce` predicts their
qualities; it is fitted to all slopes and rewards so far, around the policy's mode (`agents.slope_critic`).

The critic is to be believed only nearby. The first slopes of a language model differ from the predicted ones by factors
from below 0 to 8, and a policy that goes as far as the critic extrapolates ends far above the closed form. So whenever
the policy learns, the mean KL of a step's new distribution from the old one is at most ε (trust region, Schulman et al.
2015), and residuals move by a limited log price.

A batch is either one look with slopes at the policy's mode, which costs `SLOPES_COST` evaluations, or the mode and
samples without slopes, whichever the critic expects to lower its regret more per evaluation.

`ppo` may choose dense where it is illegal; the highest rung is then taken instead, as in `envs.BondDimensionEnv`.
`ppo-masked` gives illegal levels no probability. Does not know models, and uses only the digests of schedules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.batch_agent import BatchAgent, Record
from agents.ladder_policy import LadderPolicy, LadderSettings
from agents.measured import measured_quality, measured_slopes
from agents.policy_file import SavedPolicy
from agents.protocol import SLOPES_COST, AgentContext, ProblemLike, Proposal
from agents.slope_critic import SlopeCritic
from compression.schedule import Schedule

__all__ = ["Ppo", "PpoMasked", "PpoSettings"]

_FEWEST = 3  # trials that are learned from if there are no slopes
_RESIDUALS = "residuals"  # name of their array in a saved policy
_TRIES = 50  # rounds of sampling to fill a batch; if they yield nothing new, the neighbourhood counts as exhausted

Floats = NDArray[np.float64]
Levels = NDArray[np.int64]


@dataclass(frozen=True)
class PpoSettings(LadderSettings):
    """Settings of PPO, beside those of its policy."""

    batch: int = 10  # real episodes between two learning phases, including the greedy one
    rounds: int = 3  # imagined rollouts per learning phase
    imagined: int = 96  # episodes per imagined rollout, an even number
    entropy: float = 0.01  # bonus per nat and step at the start; falls to 0 as the budget is spent
    trust: float = 0.4  # ε, nats per step
    rate: float = 0.4  # part of the way to the critic's belief that residuals go, with few looks with slopes
    slowing: float = 6.0  # number of those after which it has halved
    stride: float = 0.3  # largest move of a residual, in log price
    reach: float = 2.5  # largest residual


@dataclass(frozen=True, eq=False)
class _Mode:
    """A mode of the policy that was measured, with the log weights of its sites, (sites,)."""

    place: Floats
    schedule: Schedule


class Ppo(BatchAgent):
    """See the module."""

    name = "ppo"
    masked = False

    def __init__(self, problem: ProblemLike, context: AgentContext, settings: PpoSettings | None = None) -> None:
        super().__init__(problem, context)
        self.settings = settings or PpoSettings()
        self.critic = SlopeCritic(problem, context.shards)
        self.policy = LadderPolicy(problem, self.masked, context.seed, self.settings)
        top = problem.offsets[-2]
        # Log weight of every level; dense is a step above the highest rung.
        self._positions = np.append(problem.offsets[:-1], 2 * top - problem.offsets[-3])
        self._episodes: dict[str, tuple[int, ...]] = {}  # levels of every proposal, by the schedule's digest
        self._residuals: Floats = np.zeros(len(problem.sites))
        left, size, _ = np.linalg.svd(problem.membership, full_matrices=False)
        self._expressed = left[:, size > 1e-9 * size[0]]  # orthonormal basis of what the steps can express
        if context.policy is not None:
            arrays = context.policy.restore(self.name, context.model, problem.names, problem.offsets, self._arrays())
            self._residuals = arrays.pop(_RESIDUALS)
            self.policy.load(arrays)
        self._here = problem.around(np.zeros(problem.steps), self._residuals)
        self._modes: list[_Mode] = []
        self._learned = 0  # what the critic knew when the policy learned
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

        Puts the mean over the second half of the measured modes first (Polyak & Juditsky 1992), then the present mode,
        the earlier ones, the latest first, and the trials of highest reward. If the second half earned less on average
        than the first mode, which is where the search started, the trials of highest reward come first.
        """
        self._learn()
        if not self._learned or not self._modes:
            return self._ledger.best(count)
        late = self._modes[len(self._modes) // 2 :]
        mean = np.mean([mode.place for mode in late], axis=0)
        modes = [self._problem.weighted(np.zeros(self._problem.steps), mean), self._proposal(self.policy.mode).schedule]
        modes += [mode.schedule for mode in self._modes[::-1]]
        best = [proposal.schedule for proposal in self._ledger.best(count)]
        ordered = [*best, *modes] if self._fell(late) else [*modes, *best]
        return list({one.digest: Proposal(one, None) for one in ordered}.values())[:count]

    def _fell(self, late: Sequence[_Mode]) -> bool:
        """Whether these modes earned less on average than the first one."""
        earned = [self.records.get(mode.schedule.digest, Record(())).mean for mode in (self._modes[:1] + list(late))]
        known = [reward for reward in earned[1:] if np.isfinite(reward)]
        return bool(known) and float(np.mean(known)) < earned[0]

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

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {**self.policy.arrays, _RESIDUALS: self._residuals}

    def _plan(self) -> None:
        """Fills the batch with a look with slopes at the policy's mode, or with the mode and samples.

        Samples again, with larger σ, until enough are new.
        """
        self._learn()
        count, mode = min(self.settings.batch, self._ledger.left), self.policy.mode
        proposal = self._proposal(mode)
        sloped = self._look_with_slopes(proposal)
        if sloped or self._enter(proposal):
            self._modes.append(_Mode(self._place(mode), proposal.schedule))
        for attempt in range(0 if sloped else _TRIES):
            for levels in self.policy.sample(count, self._generator, 1.1**attempt).taken:
                if len(self._planned) == count:
                    return
                self._enter(self._proposal(levels))

    def _levels_of(self, proposal: Proposal) -> tuple[int, ...]:
        return self._episodes[proposal.schedule.digest]

    def _proposal(self, levels: Levels) -> Proposal:
        taken = tuple(levels.tolist())
        proposal = Proposal(self._here.schedule(taken), None)
        self._episodes.setdefault(proposal.schedule.digest, taken)
        return proposal

    def _look_with_slopes(self, proposal: Proposal) -> bool:
        """Plans slopes at the policy's mode if they are worth more than samples; whether it did."""
        if self._looks >= 2 * (self.critic.passes + 1):  # half of them failed
            return False
        worth, shards = self.critic.worth_of_slopes()
        samples = self.policy.sample(8, self._generator).taken
        if self.critic.passes and worth <= self.critic.worth_of_looks(self._here.forecast_sites(samples)):
            return False
        # If the rest of the budget does not pay for slopes, the same measurement is made without.
        probe = self._problem.probe(proposal.schedule) if self._ledger.left >= SLOPES_COST else None
        repeats = (self._context.repeat(proposal.schedule, shard) for shard in shards)
        planned = any(self._enter(replace(proposal, repeat=repeat, probe=probe)) for repeat in repeats)
        self._looks += planned
        return planned

    def _place(self, levels: Levels) -> Floats:
        """Log weights of the sites in an episode, (steps,) -> (sites,)."""
        place: Floats = self._problem.membership @ self._positions[levels] + self._residuals
        return place

    def _unexpressed(self, log_weights: Floats) -> Floats:
        """What the steps cannot express of log weights, (sites,)."""
        rest: Floats = log_weights - self._expressed @ (self._expressed.T @ log_weights)
        return rest

    def _learn(self) -> None:
        """Refits the critic, moves the residuals and trains the policy, if more is known than at the last call."""
        settings, known = self.settings, self.critic.known
        if known == self._learned or not (self.critic.passes or known >= _FEWEST):
            return
        self._learned = known
        if self.critic.passes:
            self._depart()
        self.critic.fit(self._place(self.policy.mode))
        left = max(0.0, self._ledger.left / max(1, self._context.budget))
        before = self.policy.arrays
        for _ in range(settings.rounds):
            rollout = self.policy.sample(settings.imagined, self._generator)
            quality = self.critic.quality(self._here.forecast_sites(rollout.taken))
            seed = int(self._generator.integers(2**31))
            self.policy.train(rollout, quality, settings.entropy * left, seed)
        self.policy.retreat(before, rollout, settings.trust)

    def _depart(self) -> None:
        """Moves the residuals towards the critic's belief, without what the steps can express."""
        settings, here = self.settings, self._place(self.policy.mode)
        self.critic.fit(here)
        rate = settings.rate / (1 + self.critic.passes / settings.slowing)
        step = np.clip(rate * self._unexpressed(self.critic.log_weights - here), -settings.stride, settings.stride)
        moved = self._residuals + self._unexpressed(step)
        self._residuals = np.clip(moved, -settings.reach, settings.reach)
        self._here = self._problem.around(np.zeros(self._problem.steps), self._residuals)


class PpoMasked(Ppo):
    """PPO that gives illegal levels no probability."""

    name = "ppo-masked"
    masked = True
