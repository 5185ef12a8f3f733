"""Stages: what a run does, one function each, from a loaded model to a measured schedule.

Composes engine, environment, agents and evaluators. Knows no flag and no file of a run folder but the journal;
`search.pipeline` decides the order and writes the results.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from agents import Agent, Proposal
from compression.cache import FactorCache, cache_key
from compression.factors import FactorStore
from compression.sites import Site, dense_weight
from compression.statistics import Statistics, collect
from envs import Reward
from search.console import Stage
from search.corpora import Text
from search.evaluators import Evaluator, Score
from search.items import Item, render
from search.journal import Journal, Record
from search.models import LoadedModel
from search.packing import Packed, packed_item, packed_text

__all__ = [
    "CHUNK_TOKENS",
    "SHRINKAGE",
    "Calibration",
    "Trial",
    "best_trials",
    "calibration_batches",
    "factor_store",
    "run_agent",
    "workload_sequences",
]

CHUNK_TOKENS = 256
"""Longest text sequence: attention over longer ones costs time and says little more about the weights."""
_CALIBRATION_BATCH = 1024
SHRINKAGE = 0.01
"""Of the second moments, see `compression.whitening.shrink`; on search text a little better than 0.003."""


@dataclass
class Calibration:
    """Second moments of a model on a text: from the cache, or streamed when first asked for.

    Attributes:
        weighted: whether tokens are, see `compression.statistics`; if not, these are the moments of K-FAC.
        key: identity of the statistics: model, sites, text, seed.
    """

    loaded: LoadedModel
    sites: Sequence[Site]
    text: Text
    seed: int
    cache: FactorCache
    progress: Callable[[int], None] = lambda tokens: None
    weighted: bool = True
    _statistics: Statistics | None = field(default=None, repr=False)

    @property
    def key(self) -> str:
        sites = [site.name for site in self.sites]
        kind = "statistics" if self.weighted else "unweighted statistics"
        return cache_key(
            kind=kind, format=3, model=self.loaded.digest, sites=sites, text=self.text.digest, seed=self.seed
        )

    def __call__(self) -> Statistics:
        """The statistics; kept until `release`."""
        if self._statistics is None:
            bundle = self.cache.get_or_build(self.key, lambda: self._collect().to_bundle())
            self._statistics = Statistics.from_bundle(bundle)
        return self._statistics

    @cached_property
    def unweighted(self) -> Calibration:
        """The same with tokens that count alike: the first of two passes."""
        return dataclasses.replace(self, weighted=False, _statistics=None)

    def release(self) -> None:
        """Give the memory back."""
        self._statistics = self.unweighted._statistics = None

    def _collect(self) -> Statistics:
        model = self.loaded.model
        generator = torch.Generator(device=model.device).manual_seed(self.seed)
        batches = calibration_batches(self.loaded, self.text, self.seed)
        first = self.unweighted() if self.weighted else None
        return collect(model, self.sites, batches, generator, self.progress, first)


def factor_store(
    loaded: LoadedModel, sites: Sequence[Site], calibration: Calibration, cache: FactorCache
) -> FactorStore:
    """Factors of the sites of a dense model."""
    weights = {
        site.name: dense_weight(loaded.model.get_submodule(site.name)) for site in sites if not site.dense_because
    }
    return FactorStore(sites, weights, calibration, calibration.key, SHRINKAGE, cache)


def workload_sequences(
    loaded: LoadedModel, items: Iterable[Item], proxy: str, form: str, text: Iterable[Sequence[int]]
) -> list[Packed]:
    """Items rendered and packed, then texts. Items longer than the model's context are left out."""
    limit = getattr(loaded.model.config, "max_position_embeddings", None) or 1 << 30
    packed = []
    for item in items:
        request = render(item, proxy, form)
        sequence = packed_item(loaded.encode, request.context, request.continuations, request.answer)
        longest = max(stop - start for start, stop, _ in sequence.branches)
        if sequence.prefix + longest <= limit:
            packed.append(sequence)
    return packed + [packed_text(chunk[:limit]) for chunk in text if len(chunk) > 1]


@dataclass(frozen=True)
class Trial:
    """One evaluated proposal."""

    number: int
    proposal: Proposal
    score: Score
    reward: float


def run_agent(
    agent: Agent,
    budget: int,
    evaluator: Evaluator,
    reward: Reward,
    journal: Journal,
    stage: Stage,
    describe: Callable[[Sequence[Trial]], str],
) -> list[Trial]:
    """Ask, evaluate, journal, tell, until the budget is spent or the agent has finished.

    Every trial is on disk before the agent hears of it. Trials the journal holds already are told from it, so a resumed
    search replays to where it stopped.
    """
    trials: list[Trial] = []
    known = {key: Score.from_dict(score) for key, score in journal.scores().items()}
    while len(trials) < budget:
        proposals = agent.ask(budget - len(trials))
        if not proposals:
            break
        rewards = []
        for proposal in proposals:
            score = known.get((proposal.schedule.digest, proposal.look))
            if score is None:
                [score] = evaluator.evaluate([proposal.schedule], look=proposal.look)
            trial = Trial(len(trials), proposal, score, reward(score))
            journal.record(_record(trial))
            trials.append(trial)
            rewards.append(trial.reward)
            stage.advance(1, describe(trials))
        agent.tell(proposals, rewards)
    return trials


def best_trials(trials: Sequence[Trial], count: int) -> list[Trial]:
    """The `count` best by reward with a score, best first; ties go to the earlier trial."""
    scored = [trial for trial in trials if trial.score.state == "ok"]
    return sorted(scored, key=lambda trial: (-trial.reward, trial.number))[:count]


def _record(trial: Trial) -> Record:
    ok = trial.score.state == "ok"
    return Record(
        number=trial.number,
        digest=trial.proposal.schedule.digest,
        schedule=trial.proposal.schedule.to_json(),
        look=trial.proposal.look,
        actions=trial.proposal.actions,
        score=trial.score.to_dict(),
        reward=trial.reward if ok else None,
        state=trial.score.state,
        reason=trial.score.reason,
        seconds=trial.score.seconds,
    )


def calibration_batches(loaded: LoadedModel, text: Text, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(input_ids, mask) batches in a seeded order, every row full but the last ones.

    Questions follow one another in a row as sentences do in prose: full rows waste nothing on padding.
    """
    device, separator = loaded.model.device, loaded.encode("\n\n")
    stream = [token for question in text.exam for token in (*question, *separator)]
    rows = [*text.prose, *(stream[start : start + CHUNK_TOKENS] for start in range(0, len(stream), CHUNK_TOKENS))]
    random.Random(seed).shuffle(rows)
    rows.sort(key=len, reverse=True)
    count = max(1, _CALIBRATION_BATCH // CHUNK_TOKENS)
    for start in range(0, len(rows), count):
        group = rows[start : start + count]
        length = len(group[0])
        ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in group], device=device)
        sizes = torch.tensor([len(row) for row in group], device=device)
        yield ids, torch.arange(length, device=device)[None, :] < sizes[:, None]
