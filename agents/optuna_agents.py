"""Wraps Optuna's samplers as agents, by ask and tell on a study in memory.

| agent | sampler | meaning of a parameter | asks between tells |
|---|---|---|---|
| `optuna-cmaes` | separable CMA-ES (Ros & Hansen 2008) | a place on the ladder, rounded | a population |
| `optuna-gp` | Gaussian process, log expected improvement (Ament et al. 2023) | the same | 1 |
| `optuna-nsga2` | NSGA-II (Deb et al. 2002) on quality and kept fraction | a level | a population |
| `optuna-qmc` | scrambled Sobol points (Owen 1998); learns nothing | a quantile of the prior | a batch |
| `optuna-tpe` | tree-structured Parzen estimator, multivariate (Bergstra et al. 2011) | a level | 1 |

By default, all of these samplers would start uniformly over all levels^steps episodes, where a schedule is several
times worse than the closed form. They therefore get a sampling prior, like the warm start of REINFORCE: level l has a
probability ∝ exp(−offsets[l]² / 2σ²), dense a small probability, and a small part is spread evenly over the rungs. The
closed form is the first proposal. TPE, GP and NSGA-II start with draws from this prior, Sobol points pass through its
quantile function, and CMA-ES starts at the middle level with its own step size. Dense is the level above the highest
rung. Where dense is illegal, the highest rung is taken instead and reported to the study as the point, except to
CMA-ES and NSGA-II, which need the reward of exactly the point they asked for.

If a sampler proposes a schedule again, the study gets the known reward and nothing is charged. If a sampler only
repeats itself, the agent proposes a neighbour of the best trial instead, or else a random episode. If that is not new
either, the space counts as exhausted.

`recommend` uses a surrogate of all trials (`agents.surrogate`) rather than single rewards. It ranks the trials and the
means of the best trials (like the mean of an evolution strategy), which average out the noise.

Does not know models. The study in memory is separate from the run's journal, which resuming replays.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, NSGAIISampler, QMCSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import Trial, TrialState, create_trial

from agents.ledger import Ledger
from agents.protocol import AgentContext, ProblemLike, Proposal
from agents.surrogate import Surrogate, without_outliers
from compression.refusal import Refusal

__all__ = ["Floats", "Levels", "OptunaAgent", "OptunaSettings", "cmaes", "gp", "qmc", "tpe"]

Floats = NDArray[np.float64]
Levels = NDArray[np.int64]

_INSTALL = "pip install 'chisel-prior[agents]'"


@dataclass(frozen=True)
class OptunaSettings:
    """Settings of the samplers.

    The defaults were chosen on three synthetic costs of 24 and 30 blocks with 4 % noise and 200 trials, by the true
    cost of `recommend(1)` relative to the closed form. CMA-ES over two seeds: separable with a first step of 1.5 rungs
    −9.2 %, of 2.5 rungs −8.4 %; with margin and 1.5 rungs −9.2 %. Rough figures from one seed each: TPE −3.9 % without
    draws from the prior, −6.7 % with 20; Sobol points −3.5 % with σ 0.15, −1.9 % with σ 0.3, 0 % uniform over the
    levels. The other defaults were not compared.
    """

    sigma: float = 0.3  # σ of the prior, in log price
    dense_groups: float = 0.1  # mean number of groups that a draw from the prior keeps dense
    stray: float = 0.01  # part of the prior that is spread evenly over the rungs, so that every rung can be drawn
    startup: int = 20  # draws from the prior, including the closed form, before TPE and GP use their models
    sobol_sigma: float = 0.15  # σ of the prior for Sobol points; smaller, since these never adapt to rewards
    cma_sigma: float = 1.5  # first step size of CMA-ES, in rungs
    population: int = 14  # population of CMA-ES, and batch size of Sobol points
    nsga_population: int = 20
    acquisitions: int = 2  # starts of GP's acquisition optimizer; Optuna's default of 10 takes twice as long
    deepest: float = 3.0  # rewards are raised to at least the closed form's minus this many times its |quality|
    patience: int = 2  # batches in a row without a new schedule before the sampler is bypassed
    tries: int = 100  # draws near the best trial, and again as many anywhere, before the space counts as exhausted
    around: float = 0.1  # largest distance of NSGA-II's targets from the problem's target
    grid: float = 0.01  # distance between NSGA-II's targets
    anchors: int = 5  # number of targets at which NSGA-II starts from the closed form
    centres: tuple[int, ...] = (7, 14, 25)  # `recommend` considers the means of this many best trials


@dataclass(frozen=True)
class _Kind:
    """How a sampler is used. A batch consists of the asks between two tells.

    Attributes:
        make: makes the sampler.
        scale: meaning of a parameter: "level", "position" on the ladder, or "chance", a quantile in [0, 1].
        startup: number of asks in the first batch, which the prior answers, the closed form first.
        batch: number of asks in every other batch.
        repairs: whether a reward may be reported for a legal point instead of the illegal point that was asked for.
        needs: required packages in addition to Optuna.
    """

    make: Callable[[ProblemLike, int, OptunaSettings], BaseSampler]
    scale: str
    startup: Callable[[OptunaSettings], int]
    batch: Callable[[OptunaSettings], int]
    repairs: bool
    needs: tuple[str, ...] = ()


def _make_cmaes(problem: ProblemLike, seed: int, settings: OptunaSettings) -> BaseSampler:
    middle = dict.fromkeys(problem.names, float(problem.middle))
    # Optuna expresses sigma0 as a fraction of the range. Separable CMA-ES needs more than one dimension.
    return CmaEsSampler(
        x0=middle,
        sigma0=settings.cma_sigma / problem.levels,
        seed=seed,
        popsize=settings.population,
        use_separable_cma=problem.steps > 1,
    )


def _make_gp(problem: ProblemLike, seed: int, settings: OptunaSettings) -> BaseSampler:
    sampler = GPSampler(seed=seed, n_startup_trials=min(5, settings.startup))
    sampler._n_local_search = settings.acquisitions
    return sampler


def _make_nsga2(problem: ProblemLike, seed: int, settings: OptunaSettings) -> BaseSampler:
    return NSGAIISampler(seed=seed, population_size=settings.nsga_population)


def _make_qmc(problem: ProblemLike, seed: int, settings: OptunaSettings) -> BaseSampler:
    return QMCSampler(qmc_type="sobol", scramble=True, seed=seed)


def _make_tpe(problem: ProblemLike, seed: int, settings: OptunaSettings) -> BaseSampler:
    return TPESampler(seed=seed, multivariate=True, n_startup_trials=min(5, settings.startup))


_KINDS = {
    "optuna-cmaes": _Kind(_make_cmaes, "position", lambda s: 1, lambda s: s.population, False, ("cmaes",)),
    "optuna-gp": _Kind(_make_gp, "position", lambda s: s.startup, lambda s: 1, True, ("scipy",)),
    "optuna-nsga2": _Kind(_make_nsga2, "level", lambda s: s.nsga_population, lambda s: s.nsga_population, False),
    "optuna-qmc": _Kind(_make_qmc, "chance", lambda s: 1, lambda s: s.population, False, ("scipy",)),
    "optuna-tpe": _Kind(_make_tpe, "level", lambda s: s.startup, lambda s: 1, True),
}


class OptunaAgent:
    """See the module. Plans whole batches, so the proposals do not depend on how many are asked for at once.

    A point is the tuple of levels actually taken, after illegal levels were replaced.
    """

    def __init__(
        self, name: str, problem: ProblemLike, context: AgentContext, settings: OptunaSettings | None = None
    ) -> None:
        """Makes the agent called `name` in the module's table.

        Raises:
            ValueError: the sampler needs a package that is not installed.
        """
        self.name = name
        self.settings = settings or OptunaSettings()
        self._kind = _KINDS[name]
        for package in self._kind.needs:
            if importlib.util.find_spec(package) is None:
                raise Refusal(f"agent {name} needs {package}, which is not installed: {_INSTALL}")
        self._problem = problem
        self._context = context
        self._ledger = Ledger(context)
        self._generator = np.random.default_rng(context.seed)
        sigma = self.settings.sobol_sigma if self._kind.scale == "chance" else self.settings.sigma
        self._prior = _prior(problem, sigma, self.settings)
        self._space = self._make_space()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # GP warns that without an optional package it optimizes from one start after another; with two starts this is
        # no loss.
        logging.getLogger("optuna._gp").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            # Some options are marked experimental. Optuna 6, which our version range excludes, removes two of CMA-ES's.
            warnings.simplefilter("ignore", ExperimentalWarning)
            warnings.simplefilter("ignore", FutureWarning)
            sampler = self._kind.make(problem, context.seed, self.settings)
        self._study = optuna.create_study(sampler=sampler, directions=self._directions)
        self._asked = 0
        self._finished = False
        self._planned: list[Proposal] = []
        self._open: dict[str, list[Trial]] = {}  # Optuna trials that wait for a reward, by the schedule's digest
        self._points: dict[str, tuple[int, ...]] = {}
        self._told: dict[str, tuple[Proposal, float]] = {}

    def ask(self, count: int) -> list[Proposal]:
        """See `agents.Agent`. Returns at most the rest of the batch."""
        self._ledger.check(count)
        if not self._planned and not self._finished:
            self._plan()
            self._finished = not self._planned
        given, self._planned = self._planned[:count], self._planned[count:]
        return given

    def tell(self, proposals: Sequence[Proposal], rewards: Sequence[float]) -> None:
        """See `agents.Agent`."""
        self._ledger.close(proposals, rewards)
        for proposal, reward in zip(proposals, rewards, strict=True):
            digest = proposal.schedule.digest
            self._told[digest] = proposal, float(reward)
            for trial in self._open.pop(digest):
                self._finish(trial, digest)

    def recommend(self, count: int) -> list[Proposal]:
        """See `agents.Agent`. Ranks the trials and the means of the best ones by the reward the surrogate predicts."""
        actions, rewards = self._evidence()
        if len(rewards) < 3:
            return [proposal for proposal in self._ledger.best(len(rewards)) if proposal.actions is not None][:count]
        surrogate = Surrogate(self._problem)
        surrogate.fit(actions, without_outliers(rewards))
        best = actions[np.argsort(-rewards, kind="stable")]
        means = [np.rint(best[:size].mean(axis=0)).astype(np.int64) for size in self.settings.centres]
        candidates = np.unique(
            [*(tuple(self._problem.legalise(mean).tolist()) for mean in means), *map(tuple, actions.tolist())], axis=0
        )
        found: dict[str, Proposal] = {}
        for levels in candidates[np.argsort(-surrogate(candidates), kind="stable")].tolist():
            if len(found) < count:
                proposal = Proposal(self._problem.schedule(levels), tuple(levels))
                found.setdefault(proposal.schedule.digest, proposal)
        return list(found.values())

    def _plan(self) -> None:
        """Asks the study for batches until one has a new schedule; known schedules get their reward at once."""
        for _ in range(self.settings.patience):
            for _ in range(self._kind.batch(self.settings) if self._asked else self._kind.startup(self.settings)):
                if self._ledger.left:
                    self._enter(None if self._ready() else self._start(self._asked))
            if self._planned or not self._ledger.left:
                return
        if (point := self._unseen()) is not None:
            self._enter(point)

    def _ready(self) -> bool:
        """Whether the sampler chooses the points rather than the prior."""
        first = self._asked < self._kind.startup(self.settings)
        return not first and any(math.isfinite(reward) for _, reward in self._told.values())

    def _enter(self, point: tuple[int, ...] | None) -> None:
        """Makes one ask of the study, which answers with `point` or, if that is None, with the sampler's point."""
        if point is not None:
            self._study.enqueue_trial(self._parameters(point))
        trial = self._study.ask(self._space)
        self._asked += 1
        point = self._taken(self._wanted(trial))
        proposal = self._proposal(point)
        digest = proposal.schedule.digest
        if self._ledger.add(proposal):
            self._planned.append(proposal)
            self._points[digest] = point
        if digest in self._told:
            self._finish(trial, digest)
        else:
            self._open.setdefault(digest, []).append(trial)

    def _unseen(self) -> tuple[int, ...] | None:
        """Searches a point whose schedule was not proposed before; returns None if `tries` fail.

        Tries the best trial with one parameter changed first, then random points.
        """
        best = max(self._told.items(), key=lambda item: np.nan_to_num(item[1][1], nan=-np.inf), default=None)
        for attempt in range(2 * self.settings.tries):
            point = self._uniform()
            if best is not None and attempt < self.settings.tries:
                place = int(self._generator.integers(len(point)))
                near = list(self._points[best[0]])
                near[place] = point[place]
                point = tuple(near)
            point = self._taken(point)
            if self._proposal(point).schedule.digest not in self._points:
                return point
        return None

    def _finish(self, trial: Trial, digest: str) -> None:
        """Reports a reward to the study; a failure counts as the worst reward so far, or as failed before the first."""
        proposal, reward = self._told[digest]
        finite = [value for _, value in self._told.values() if math.isfinite(value)]
        if not finite:
            self._study.tell(trial, state=TrialState.FAIL)
            return
        values = self._values(proposal, reward if math.isfinite(reward) else min(finite))
        wanted = self._wanted(trial)
        if self._kind.repairs and (point := self._taken(wanted)) != wanted:
            self._study.tell(trial, state=TrialState.FAIL)
            self._study.add_trial(
                create_trial(params=self._parameters(point), distributions=self._space, values=values)
            )
        else:
            self._study.tell(trial, values)

    # `OptunaPareto` overrides several of the following members for its two objectives.

    _directions: ClassVar[list[StudyDirection]] = [StudyDirection.MAXIMIZE]

    def _values(self, proposal: Proposal, reward: float) -> list[float]:
        """Values to report for a finite reward, bounded below: how bad a failure is teaches nothing and misleads GP."""
        first, least = next(pair for pair in self._told.values() if math.isfinite(pair[1]))
        return [max(reward, least - self.settings.deepest * abs(self._quality(first, least)))]

    def _make_space(self) -> dict[str, BaseDistribution]:
        levels = self._problem.levels
        ranges: dict[str, BaseDistribution] = {
            "level": IntDistribution(0, levels - 1),
            "position": FloatDistribution(-0.5, levels - 0.5),
            "chance": FloatDistribution(0.0, 1.0),
        }
        return dict.fromkeys(self._problem.names, ranges[self._kind.scale])

    def _start(self, number: int) -> tuple[int, ...]:
        """Point number `number` of the first batch: the closed form, then draws from the prior."""
        if number == 0:
            return (self._problem.middle,) * self._problem.steps
        return tuple(self._generator.choice(self._problem.levels, self._problem.steps, p=self._prior).tolist())

    def _uniform(self) -> tuple[int, ...]:
        return tuple(self._generator.integers(self._problem.levels, size=self._problem.steps).tolist())

    def _parameters(self, point: tuple[int, ...]) -> dict[str, Any]:
        """The study's parameters for a point."""
        if self._kind.scale == "level":
            return dict(zip(self._space, point, strict=True))
        above = np.cumsum(self._prior)
        values = above[list(point)] - self._prior[list(point)] / 2 if self._kind.scale == "chance" else point
        return {name: float(value) for name, value in zip(self._space, values, strict=True)}

    def _wanted(self, trial: Trial) -> tuple[int, ...]:
        """The point that an Optuna trial asks for, legal or not."""
        values = np.array([trial.params[name] for name in self._space])
        if self._kind.scale == "chance":
            values = np.searchsorted(np.cumsum(self._prior)[:-1], values, side="right")
        elif self._kind.scale == "position":
            values = np.clip(np.floor(values + 0.5), 0, self._problem.levels - 1)
        return tuple(values.astype(np.int64).tolist())

    def _taken(self, point: tuple[int, ...]) -> tuple[int, ...]:
        """Returns `point` with every illegal dense level replaced."""
        return tuple(self._problem.legalise(point).tolist())

    def _proposal(self, point: tuple[int, ...]) -> Proposal:
        return Proposal(self._problem.schedule(point), point)

    def _quality(self, proposal: Proposal, reward: float) -> float:
        """The reward without its compression term."""
        return reward - self._context.compression_weight * (1 - self._problem.kept(proposal.schedule))

    def _evidence(self) -> tuple[Levels, Floats]:
        """Levels of the trials with a finite reward, (n, steps), and their rewards, (n,)."""
        told = [(self._points[digest], reward) for digest, (_, reward) in self._told.items() if math.isfinite(reward)]
        actions = np.array([point for point, _ in told], dtype=np.int64).reshape(-1, self._problem.steps)
        return actions, np.array([reward for _, reward in told])


def _prior(problem: ProblemLike, sigma: float, settings: OptunaSettings) -> Floats:
    """Prior probability of every level, (levels,), see the module."""
    weights = np.exp(-np.square(problem.offsets[:-1]) / (2 * sigma**2))
    rungs = (1 - settings.stray) * weights / weights.sum() + settings.stray / len(weights)
    dense = min(0.5, settings.dense_groups / problem.steps)
    return np.append((1 - dense) * rungs, dense)


# The registry calls these with a problem and a context.
cmaes = partial(OptunaAgent, "optuna-cmaes")
gp = partial(OptunaAgent, "optuna-gp")
qmc = partial(OptunaAgent, "optuna-qmc")
tpe = partial(OptunaAgent, "optuna-tpe")
