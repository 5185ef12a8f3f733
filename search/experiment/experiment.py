"""Hold everything a run works on: a loaded model, its sites, data and factors, and evaluators on each part of the data.

Knows how the search data are divided; does not know the order of the stages of a run.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest

import torch
from torch import nn

from compression.allocation.menu import Menu, whole, worth_their_time
from compression.decomposition.factors import FactorStore
from compression.decomposition.repair import repair_
from compression.decomposition.unfinished_repair import UnfinishedRepair
from compression.layers.planner import Planner
from compression.numerics.packed_size import FLOATING
from compression.numerics.pivoted_product import ALIGNED
from compression.refusal import Refusal
from compression.schedule import Form, Schedule
from compression.sites import Site, Unit
from compression.storage.factor_cache import FactorCache, cache_key
from search.config import Config
from search.data.items import Item
from search.data.own_text import read_own_text
from search.data.prompts import render
from search.data.prose import long_text
from search.data.splits import SEARCHED, UNSEEN, OwnText, Splits, build_splits
from search.evaluation.evaluator import REUSE_BYTES, ModelEvaluator
from search.evaluation.forward_time import seconds_per_token, seconds_per_token_by_parts
from search.evaluation.latency import layer_costs
from search.evaluation.packed_sequences import Packed, classified_text, masked_text, packed_item, packed_text
from search.evaluation.shared_rows import APART, shares_rows
from search.evaluation.site_times import SiteTimes
from search.evaluation.workload import Workload
from search.experiment.calibration import CHUNK_TOKENS, Calibration, calibration_batches, factor_store
from search.experiment.open_model import open_model
from search.experiment.token_streams import token_stream
from search.model.budget import Budget
from search.model.devices import resolve_device
from search.model.ends import head_moment, rounded_ends
from search.model.kinds import Kind
from search.model.loading import LoadedModel
from search.runtime.files import cache_folder
from search.runtime.memory import free_at_once

__all__ = ["Experiment", "Extract", "workload_sequences"]

_SELECTION = 4  # the selection set is this many times as large as a shard
_SPARE = 64  # characters of a user's own text that are read for every token that is wanted
_BATCH = 1024  # tokens in one forward pass
_ITEMS = "items"  # name of the corpus of all items
_HEAD_TOKENS = 8192  # tokens of calibration text whose last hidden states give the metric of the head
_RACING_BATCH = 512  # tokens between two early-stopping checks of a finalist


@dataclass(frozen=True)
class Extract:
    """A part of the search data that an evaluator uses instead of the shards.

    Attributes:
        tokens: most tokens of the extract, which alternates texts and questions from all shards.
        context: if given, the extract is instead a single text of this many tokens, without questions.
    """

    tokens: int
    context: int | None = None


@dataclass(frozen=True, eq=False)
class Experiment:
    """The opened model of a run with its data and statistics.

    Attributes:
        config: configuration of the run.
        loaded: the model, dense except while an evaluator or a healing changes it.
        sites: the sites of the model.
        splits: the data, divided into calibration, search and held-out parts.
        calibration: the calibration statistics, collected at first use.
        store: the factors of the sites.
        device: device of the model.
        budget: what schedules may keep.
    """

    config: Config
    loaded: LoadedModel
    sites: tuple[Site, ...]
    splits: Splits
    calibration: Calibration
    store: FactorStore
    device: torch.device
    budget: Budget
    _menus: dict[tuple[object, ...], Menu] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        config: Config,
        loaded: LoadedModel,
        sites: tuple[Site, ...],
        device: torch.device,
        warn: Callable[[str], None] = warnings.warn,
    ) -> Experiment:
        """Read and divide the data for a loaded model, without computing anything yet.

        Args:
            warn: called with a message if a file in the cache is damaged, or if texts cannot share rows in this model.

        Raises:
            ValueError, DataUnavailable: as for `search.data.splits.build_splits`; or an item has no label that a
                classifier knows.
        """
        parts = config.search_shards + _SELECTION
        splits = build_splits(
            loaded.encode,
            config.proxy,
            calibration_tokens=config.calibration_tokens,
            search_text_tokens=config.search_text_tokens * parts,
            search_items=config.search_items * parts,
            heldout_tokens=config.heldout_tokens,
            report_items=config.report_items,
            chunk_tokens=CHUNK_TOKENS,
            seed=config.seed,
            beginning=loaded.beginning,
            fits=partial(_fits, loaded, config),
            parts=parts,
            fewest=1 + _SELECTION,
            own=_own_text(config, loaded),
            stream=partial(token_stream, loaded),
        )
        encoder = loaded.kind.is_encoder  # reads one text at a time anyway
        if (
            not encoder
            and not loaded.is_outline
            and not shares_rows(
                loaded.model, max(splits.calibration.chunks, key=len)[:CHUNK_TOKENS], identity=_identity(config, loaded)
            )
        ):
            warn(APART)
        made_for = {"architecture": loaded.architecture} if loaded.architecture else {}
        cache = FactorCache(cache_folder() / "factors", warn, made_for)
        calibration = Calibration(loaded, sites, splits.calibration, config.seed, config.shrinkage, cache)
        if calibration.by_block:
            free_at_once()
        budget = Budget.of(config, loaded.model, sites)  # of the dense model
        store = factor_store(loaded, sites, calibration, cache, budget.forms)
        return cls(config, loaded, sites, splits, calibration, store, device, budget)

    @classmethod
    def open(cls, config: Config) -> Experiment:
        """Open the experiment of a configuration: load the model onto its device and read the data.

        Raises:
            ValueError, DataUnavailable: as for `open_model` and `of`.
        """
        device = resolve_device(config.device)
        return cls.of(config, *open_model(config, device), device)

    @property
    def search_shards(self) -> int:
        """Number of shards of the search data; fewer than in the configuration if there is not data enough."""
        return self.splits.parts - _SELECTION

    def shards(self, part: str) -> list[list[Packed]]:
        """The packed sequences of one part of the data, by shard.

        Args:
            part: "search" for trials, one list per shard; "selection" for the choice among finalists, one list;
                "heldout" for the final table, one list, with the unseen text as a corpus that is set aside.
        """
        config, splits = self.config, self.splits
        if part == "heldout":
            unseen = tuple((UNSEEN, chunk) for chunk in splits.unseen_text.prose)
            dealt = [(splits.report_items, splits.heldout_text.labelled + unseen)]
        else:
            parts = splits.parts
            items, text = splits.search_items, splits.search_text.labelled
            dealt = [(items[number::parts], text[number::parts]) for number in range(parts)]
            if part == "search":
                dealt = dealt[: self.search_shards]
            else:
                rest = dealt[self.search_shards :]
                dealt = [(sum((items for items, _ in rest), ()), sum((text for _, text in rest), ()))]
        return [workload_sequences(self.loaded, items, config.proxy, config.proxy_form, text) for items, text in dealt]

    def measured_on(self, part: str) -> dict[str, object]:
        """All that determines the scores of `evaluator(part)`, as plain JSON values."""
        sequences = [dataclasses.astuple(sequence) for shard in self.shards(part) for sequence in shard]
        configuration = self.config.definition()
        return {**self.identity, "configuration": configuration, "part": part, "sequences": cache_key(of=sequences)}

    def extract(self, wanted: Extract) -> list[Packed]:
        """The packed sequences of an extract.

        Raises:
            ValueError: the search text is shorter than the requested context.
        """
        if wanted.context:
            return [_packed_text(self.loaded, long_text(self.loaded.encode, wanted.context, self.loaded.beginning))]
        return self.mixture(wanted.tokens)

    def mixture(self, tokens: int) -> list[Packed]:
        """Texts and questions of the search shards in alternation, up to `tokens` tokens but at least one of each."""
        every = [sequence for shard in self.shards("search") for sequence in shard]
        texts, items = ([one for one in every if bool(one.branches) == scored] for scored in (False, True))
        taken: list[Packed] = []
        for sequence in (one for pair in zip_longest(texts, items) for one in pair if one is not None):
            if len(taken) < 2 or sum(len(one.tokens) for one in taken) + len(sequence.tokens) <= tokens:
                taken.append(sequence)
        return taken

    @property
    def identity(self) -> dict[str, object]:
        """Digests of the model and data, as plain JSON values.

        With the configuration they identify what a score was measured on.
        """
        return {
            "model": self.loaded.digest,
            "architecture": self.loaded.architecture,
            "statistics": self.calibration.key,
            "search_text": self.splits.search_text.digest,
            "search_items": cache_key(items=[item.digest for item in self.splits.search_items]),
            "kl_counts": self._kl_counts,
            "dtype": str(self.loaded.model.dtype),
        }

    @property
    def _kl_counts(self) -> str:
        """What the KL counts of the search items; earlier versions counted instructions, if there were any."""
        config, items = self.config, self.splits.search_items
        instructed = any(render(item, config.proxy, config.proxy_form).instruction for item in items)
        without = instructed and self.loaded.kind is not Kind.CLASSIFIER
        return "no instructions of items" if without else "instructions of items too"

    @contextmanager
    def evaluator(
        self,
        part: str,
        anchor: Schedule | None = None,
        extract: Extract | None = None,
        reuse_bytes: int = REUSE_BYTES,
        progress: Callable[[], None] = lambda: None,
    ) -> Iterator[ModelEvaluator]:
        """Context with an evaluator on one part of the data or on an extract; the model is dense again afterwards.

        Args:
            part: as for `shards`. On "heldout", scores are measured with the packed tensors that a schedule stores.
            anchor: as for `ModelEvaluator`.
            extract: the data to use instead of the shards of `part`.
            reuse_bytes, progress: as for `ModelEvaluator`.
        """
        config, reported = self.config, part == "heldout"
        racing = part == "selection"
        batch_tokens = _RACING_BATCH if racing else _BATCH
        shards = self.shards(part) if extract is None else [self.extract(extract)]
        identity = _identity(config, self.loaded)
        workloads = [Workload(one, self.loaded.model, batch_tokens, racing, identity) for one in shards]
        repairing = config.reward_repair_tokens and not reported
        evaluator = ModelEvaluator(
            self.loaded.model,
            self.store,
            workloads,
            anchor,
            reuse_bytes,
            packed=reported,
            sizes=self.budget.sizes,
            ends=self.stored_ends() if reported else {},
            repair=partial(self.repair_, tokens=config.reward_repair_tokens) if repairing else None,
            times=self.times() if config.latency_weight else None,
            progress=progress,
        )
        try:
            yield evaluator
        finally:
            evaluator.close()

    def stored_ends(self) -> dict[str, nn.Module]:
        """The embedding and the head as the files of the run store them, by name; none if they are kept as they are.

        Made from the model as it is now, so that it has to be dense. Below 8 bits they are rounded in the metric of
        what the head reads on calibration text; in 8 bits rounding to nearest does no harm.
        """
        model, bits = self.loaded.model, self.budget.embedding_bits
        if bits == FLOATING:
            return {}
        moment = None if bits == 8 else self.head_moment()
        return rounded_ends(model, bits, moment, self.config.scale_group)

    def head_moment(self) -> torch.Tensor | None:
        """What `search.model.ends.head_moment` gives on calibration text; None for a model without an output head."""
        model = self.loaded.model
        return head_moment(model, self.repair_batches(_HEAD_TOKENS)) if model.get_output_embeddings() else None

    def references(self, anchor: Schedule | None) -> int:
        """Number of passes over shards that the evaluator of a search makes before it can score a schedule."""
        shards = self.search_shards
        return 2 * shards if anchor is not None and shards > 1 else shards

    def repair_(
        self,
        schedule: Schedule,
        tokens: int,
        progress: Callable[[int], None] = lambda done: None,
        unfinished: UnfinishedRepair | None = None,
    ) -> Mapping[str, nn.Module]:
        """Apply `schedule` to the dense model and repair it on calibration text; returns the modules it replaced.

        See `compression.decomposition.repair.repair_`. The statistics stay in memory until `calibration.release`.

        Args:
            tokens: number of calibration tokens to repair with.
            progress, unfinished: as for `compression.decomposition.repair.repair_`.
        """
        statistics, batches = self.calibration(), self.repair_batches(tokens)
        of, how = (self.loaded.model, self.sites, schedule), (self.calibration.shrinkage, self.store.bonds.elimination)
        entries = self.store.entries.entries
        return repair_(*of, statistics, batches, *how, progress=progress, unfinished=unfinished, entries=entries)

    def repair_batches(self, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The first calibration batches with `tokens` tokens or slightly more, in the order of the calibration."""
        batches, seen = [], 0
        for ids, mask in calibration_batches(self.loaded, self.splits.calibration, self.config.seed):
            if seen >= tokens:
                break
            batches.append((ids, mask))
            seen += int(mask.sum())
        return batches

    def menu(self, progress: Callable[[int], None] = lambda done: None) -> Menu:
        """The menu of options per site, built at the first call.

        If time counts in the reward (`latency_weight` above 0), the menu contains only options that are aligned in
        memory and worth their time.
        """
        form, multiple = self.config.form, self.config.width_multiple
        weight = self.config.latency_weight
        key = form, multiple, weight, self.config.optimize
        if key not in self._menus:
            self._menus[key] = self._menu(progress, form, multiple, weight)
        return self._menus[key]

    def _menu(self, progress: Callable[[int], None], form: Form, multiple: int | None, weight: float) -> Menu:
        aligned, price = ALIGNED if weight else 1, self.budget.price
        menu = self.store.menu(
            progress=progress,
            form=form,
            multiple=multiple,
            chi_multiple=aligned,
            price=price,
            factored=self.config.has_factors,
        )
        if self.config.engine.whole_heads:
            menu = Menu(tuple(whole(each) if _of_heads(each.site) else each for each in menu.sites))
        if not weight:
            return menu
        times = self.times()
        return worth_their_time(menu, [weight * times.shares(options) for options in menu.sites])

    def times(self) -> SiteTimes:
        """The function that estimates the time fraction of a schedule on this machine."""
        planner = Planner(self.config.optimize, layer_costs())
        return SiteTimes(self.sites, planner, self.loaded.model.dtype, self.device)

    def seconds_per_token(self) -> float:
        """Seconds per token of a forward pass of the dense model, measured now."""
        measured = seconds_per_token_by_parts if self.loaded.is_outline else seconds_per_token
        return measured(self.loaded.model, CHUNK_TOKENS)


def _identity(config: Config, loaded: LoadedModel) -> Mapping[str, str] | None:
    """The digests that tell the model from any other; None for code of its own, which they do not cover."""
    return loaded.identity if loaded.architecture and not config.trust_remote_code else None


def _of_heads(unit: Site | Unit) -> bool:
    """Whether a unit is an attention, of whose bond each group has several rows."""
    return isinstance(unit, Unit) and any(cut.size > 1 for site in unit.sites for cut in site.cuts)


def _own_text(config: Config, loaded: LoadedModel) -> OwnText | None:
    """The user's own calibration text, in the chat format of the model; None if there is none."""
    if config.calibration is None:
        return None
    tokens = config.calibration_tokens
    if config.calibration_for_search:
        tokens += SEARCHED * config.search_text_tokens * (config.search_shards + _SELECTION)
    documents = read_own_text(config.calibration, loaded.tokenizer, _SPARE * tokens)
    return OwnText(config.calibration, documents, config.calibration_for_search)


def workload_sequences(
    loaded: LoadedModel, items: Iterable[Item], proxy: str, form: str, text: Iterable[tuple[str, Sequence[int]]]
) -> list[Packed]:
    """Render and pack items, followed by texts.

    Items longer than the model's context are dropped; texts are cut to it. For a masked language model, items are texts
    too: questions with their correct answers. A classifier sorts the questions of items, and has no other texts.

    Args:
        proxy: name of the proxy, which determines the prompt.
        form: form of the prompt, see `search.data.prompts.render`.
        text: (corpus, tokens) pairs.
    """
    if loaded.kind is Kind.CLASSIFIER:
        return [_classified(loaded, item) for item in items]
    limit = _longest(loaded)
    texts = [_packed_text(loaded, chunk[:limit], corpus) for corpus, chunk in text if len(chunk) > 1]
    if loaded.kind is Kind.MASKED:
        return [_packed_text(loaded, _answered(loaded, item, proxy, form), "exam") for item in items] + texts
    packed = [replace(_packed(loaded, item, proxy, form), corpus=_ITEMS) for item in items]
    return [sequence for sequence in packed if _is_short(sequence, limit)] + texts


def _packed_text(loaded: LoadedModel, tokens: Sequence[int], corpus: str = "") -> Packed:
    """A text as the model reads it: with masked tokens if it predicts these."""
    packed = packed_text(tokens, corpus) if loaded.mask_token is None else masked_text(*loaded.masked(tokens), corpus)
    return replace(packed, aside=corpus == UNSEEN)


def _answered(loaded: LoadedModel, item: Item, proxy: str, form: str) -> list[int]:
    request = render(item, proxy, form)
    question = request.context.removeprefix(request.instruction)
    return loaded.encode_whole(question + request.continuations[request.answer])


def _classified(loaded: LoadedModel, item: Item) -> Packed:
    """An item whose question is a text and whose correct choice is the name or number of its class."""
    names: Mapping[str, int] = loaded.model.config.label2id or {}
    choice, classes = item.choices[item.answer], int(loaded.model.config.num_labels)
    number = names.get(choice, int(choice) if choice.isdecimal() else -1)
    if not 0 <= number < classes:
        raise Refusal(
            f"a label must be one of {', '.join(names)} or a number below {classes}, as {loaded.model_id} has these "
            f"classes, got {choice!r:.60}; give texts with such labels as --proxy FILE.jsonl"
        )
    return classified_text(loaded.whole(loaded.encode_whole(item.question)), classes, number)


def _fits(loaded: LoadedModel, config: Config, item: Item) -> bool:
    """Whether the model can score an item as a whole; for an encoder, a long one is cut.

    Raises:
        Refusal: the model is a classifier, and the item has no label that it knows.
    """
    if loaded.kind is Kind.CLASSIFIER:
        _classified(loaded, item)
    return loaded.kind.is_encoder or _is_short(_packed(loaded, item, config.proxy, config.proxy_form), _longest(loaded))


def _longest(loaded: LoadedModel) -> int:
    """The most tokens that the model can read at once."""
    return loaded.positions or 1 << 30


def _packed(loaded: LoadedModel, item: Item, proxy: str, form: str) -> Packed:
    request = render(item, proxy, form)
    parts = (request.context, request.continuations, request.answer, request.instruction)
    return packed_item(loaded.encode_whole, *parts)


def _is_short(sequence: Packed, limit: int) -> bool:
    """Whether the prefix with its longest branch has at most `limit` tokens."""
    return sequence.prefix + max(stop - start for start, stop, _ in sequence.branches) <= limit
