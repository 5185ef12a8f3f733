"""Implements the three ways to score a schedule that `benchmarks.evaluate` compares, called sides.

They are the literature's method, swapping of modules, and Chisel's evaluator. All sides score the same schedules on the
same items and texts. A side is made once and then called with one schedule after the other.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from operator import sub
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from compression.decomposition.factors import FactorStore
from compression.layers.mpo_linear import MPOLinear
from compression.schedule import Schedule
from compression.sites import Site, dense_weight, discover_sites
from compression.storage.factor_cache import FactorCache
from search.evaluation.evaluator import ModelEvaluator
from search.evaluation.packed_sequences import Packed, packed_item, packed_text
from search.evaluation.workload import Workload
from search.model.loading import LoadedModel, load_model
from search.model.sources import locate
from search.runtime.files import cache_folder

__all__ = ["SIDES", "Figures", "Naive", "Ours", "Swapping", "Work", "plain_store"]

_BATCH = 16  # rows per forward pass of the sides that pad


@dataclass(frozen=True)
class Work:
    """Data on which a schedule is scored: items as (context, continuations, answer), and token sequences."""

    items: tuple[tuple[str, tuple[str, ...], int], ...]
    texts: tuple[tuple[int, ...], ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Work:
        row = json.loads(text)
        items = tuple((context, tuple(choices), answer) for context, choices, answer in row["items"])
        return cls(items, tuple(map(tuple, row["texts"])))

    def describe(self) -> str:
        return f"{len(self.items)} MMLU items in continuation form and {sum(map(len, self.texts))} tokens of prose"

    def packed(self, loaded: LoadedModel) -> list[Packed]:
        items = [packed_item(loaded.encode_whole, *item) for item in self.items]
        return items + [packed_text(text) for text in self.texts]


@dataclass(frozen=True)
class Figures:
    """A side's score of a schedule: mean KL in nats per token (NaN if not computed), and log-probability per choice."""

    kl: float
    choices: tuple[tuple[float, ...], ...]

    @property
    def likeliest(self) -> tuple[int, ...]:
        """Index of the likeliest continuation of every item, which decides accuracy."""
        return tuple(max(range(len(row)), key=row.__getitem__) for row in self.choices)


def plain_store(loaded: LoadedModel, sites: Sequence[Site]) -> FactorStore:
    """Makes a store of factors in the plain metric, which needs no statistics, backed by the user's cache."""

    def none() -> Any:
        raise AssertionError("the plain metric has no statistics")

    weights = {site.name: dense_weight(loaded.model.get_submodule(site.name)) for site in sites}
    return FactorStore(sites, weights, none, "none", 0.0, FactorCache(cache_folder() / "factors"))


class Naive:
    """Loads the model, decomposes every site by SVD, inserts the factors, and calls `lm_eval.evaluate`."""

    def __init__(self, work: Work, folder: Path) -> None:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        from lm_eval.tasks import TaskManager

        self.seconds: dict[str, float] = {}
        self._folder = locate("default").folder
        tokenizer = AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False)
        items = [{"context": context, "choices": list(choices), "answer": n} for context, choices, n in work.items]
        choose = {
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        }
        read = {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        }
        tasks = {
            "items": (items, choose),
            "texts": ([{"text": tokenizer.decode(text)} for text in work.texts], read),
        }
        for name, (rows, kind) in tasks.items():
            (folder / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
            task = {
                "task": name,
                "dataset_path": "json",
                "dataset_kwargs": {
                    "data_files": {"test": str(folder / f"{name}.json")},
                    "cache_dir": str(folder / "cache"),
                },
                "test_split": "test",
            }
            (folder / f"{name}.yaml").write_text(json.dumps(task | kind))
        with _silence():
            self._tasks = TaskManager(include_path=str(folder), include_defaults=False).load(list(tasks))

    def __call__(self, schedule: Schedule) -> Figures:
        """Scores a schedule and stores the seconds of the parts in `seconds`; the KL is NaN."""
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        times = [time.perf_counter()]
        with _silence():
            model = AutoModelForCausalLM.from_pretrained(
                self._folder, dtype=torch.float32, trust_remote_code=False
            ).eval()
            tokenizer = AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False)
            times.append(time.perf_counter())
            for name, choice in schedule:
                site = model.get_submodule(name)
                factors = torch.linalg.svd(site.weight.detach(), full_matrices=False)
                if not choice.is_dense:
                    model.set_submodule(name, _two_layers(*factors, choice.chi))
            times.append(time.perf_counter())
            results = evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH), self._tasks)
            times.append(time.perf_counter())
        self.seconds = dict(zip(("load", "decompose", "lm-eval"), map(sub, times[1:], times), strict=True))
        samples = sorted(results["samples"]["items"], key=lambda sample: sample["doc_id"])
        return Figures(math.nan, tuple(tuple(one[0] for one in sample["filtered_resps"]) for sample in samples))


def _two_layers(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, chi: int) -> nn.Module:
    first, second = nn.Linear(vh.shape[1], chi, bias=False), nn.Linear(chi, u.shape[0], bias=False)
    first.weight.data, second.weight.data = s[:chi, None] * vh[:chi], u[:, :chi].contiguous()
    return nn.Sequential(first, second)


class Swapping:
    """Gives every site a new module from cached factors.

    Every choice is a separate padded row with its whole context; logits and log-probabilities are computed at all
    positions.
    """

    def __init__(self, work: Work, folder: Path) -> None:
        loaded = load_model("default", "cpu")
        self._model = loaded.model
        self._store = plain_store(loaded, discover_sites(self._model))
        self._dense = {site.name: self._model.get_submodule(site.name) for site in self._store.sites}
        rows: list[tuple[tuple[int, ...], int, bool]] = []  # tokens, first scored position, whether it counts for KL
        for context, choices, answer in work.items:
            start = len(loaded.encode_whole(context))
            rows += [(tuple(loaded.encode_whole(context + c)), start, n == answer) for n, c in enumerate(choices)]
        rows += [(text, len(text), True) for text in work.texts]
        self._rows = rows
        self._order = sorted(range(len(rows)), key=lambda number: -len(rows[number][0]))
        self._counts = [len(choices) for _, choices, _ in work.items]
        self._reference: dict[int, torch.Tensor] = {}
        self._reference = dict(self._compared())

    def __call__(self, schedule: Schedule) -> Figures:
        for name, choice in schedule:
            dense = self._dense[name]
            swapped = dense if choice.is_dense else MPOLinear(self._store.cores(name, choice), dense.bias)
            self._model.set_submodule(name, swapped)
        total, tokens = 0.0, 0
        sums = [0.0] * len(self._rows)
        for number, log_probability in self._compared(sums):
            dense = self._reference[number]
            total += float((dense.exp() * (dense - log_probability)).sum())
            tokens += len(dense)
        values = iter(sums)
        return Figures(total / tokens, tuple(tuple(next(values) for _ in range(count)) for count in self._counts))

    @torch.inference_mode()
    def _compared(self, sums: list[float] | None = None) -> Any:
        """Yields number and log-probabilities of the rows that count for the KL.

        Args:
            sums: if given, receives every row's log-probability from its first scored token on.
        """
        for start in range(0, len(self._order), _BATCH):
            numbers = self._order[start : start + _BATCH]
            longest = max(len(self._rows[number][0]) for number in numbers)
            ids = torch.tensor([[*self._rows[n][0], *[0] * (longest - len(self._rows[n][0]))] for n in numbers])
            mask = torch.tensor([[p < len(self._rows[n][0]) for p in range(longest)] for n in numbers]).long()
            logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            log_probability = torch.log_softmax(logits.float(), -1)
            for row, number in enumerate(numbers):
                tokens, first, compared = self._rows[number]
                mine = log_probability[row, : len(tokens) - 1]
                if sums is not None:
                    chosen = mine.gather(1, torch.tensor(tokens[1:])[:, None])[first - 1 :]
                    sums[number] = float(chosen.double().sum())
                if compared:
                    yield number, mine.clone() if sums is None else mine


class Ours:
    """Runs `search.evaluation.evaluator.ModelEvaluator` on one workload."""

    def __init__(self, work: Work, folder: Path) -> None:
        loaded = load_model("default", "cpu")
        self._model = loaded.model
        store = plain_store(loaded, discover_sites(self._model))
        self.workload = Workload(work.packed(loaded), self._model)
        self.evaluator = ModelEvaluator(self._model, store, [self.workload])

    def __call__(self, schedule: Schedule) -> Figures:
        [score] = self.evaluator.evaluate([schedule])
        assert score.state == "ok", score.reason or score.state
        return Figures(score.kl, ())

    def choices(self) -> tuple[tuple[float, ...], ...]:
        """Log-probability per choice under the schedule called last, computed by another pass."""
        found = self.workload.continuations(self._model)
        return tuple(tuple(one.loglikelihood for one in of_item) for of_item in found)


SIDES: dict[str, Callable[[Work, Path], Callable[[Schedule], Figures]]] = {
    "naive": Naive,
    "swapping": Swapping,
    "ours": Ours,
}


@contextmanager
def _silence() -> Iterator[None]:
    """Silences progress bars and warnings of other libraries within the context."""
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as null, redirect_stderr(null):
            yield
    finally:
        logging.disable(logging.NOTSET)
