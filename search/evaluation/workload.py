"""Measure the quality of a model against the dense model by one forward pass over a fixed set of texts and items.

Knows a causal language model and its logits; does not know schedules or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from compression.numerics.products import rounds_products
from compression.refusal import Refusal
from search.evaluation.logits import Dense, Reading, log_normalizer, read
from search.evaluation.packed_sequences import (
    ROW_TOKENS,
    Packed,
    Prediction,
    apart,
    group,
    mix,
    pack,
    predictions,
    row_inputs,
)
from search.evaluation.quality import CorpusQuality, Quality, mean_standard_error, ratio_standard_error
from search.evaluation.shared_rows import shares_rows

__all__ = ["Continuation", "RunForward", "ShouldStop", "Workload", "loglikelihoods", "run_directly"]

_MULTIPLE = 32
"""Tokens of which a row has a multiple, where a CPU multiplies 16-bit numbers. It compiles a kernel for every number of
tokens and every χ, which takes longer than the product."""

ShouldStop = Callable[[Quality, int], bool]
"""Decides whether to stop early, given the quality so far and the largest number of times that it may be called."""

RunForward = Callable[[Hashable, Callable[[], Any]], Any]
"""Runs a forward pass, given an object that identifies the inputs and a function that makes the pass."""


def run_directly(batch: Hashable, forward: Callable[[], Any]) -> Any:
    """Run the whole forward pass without reuse."""
    return forward()


@dataclass(eq=False)
class _Batch:
    """Rows of packed sequences, with the position and target of every prediction.

    The first `compared` predictions count for KL and agreement; they belong to prefixes and correct answers.
    """

    inputs: dict[str, torch.Tensor]
    compared: int
    source: torch.Tensor  # flat position whose logits predict the target
    target: torch.Tensor  # predicted token
    owner: torch.Tensor  # sequence number of each prediction
    branch: torch.Tensor  # global branch number of a scored continuation token, -1 elsewhere
    dense: Dense | None = None


class Continuation(NamedTuple):
    """Summed log-probability of a continuation, nats, and whether every token of it is the likeliest at its place."""

    loglikelihood: float
    greedy: bool


class Workload:
    """A fixed set of texts and items, tokenized and batched once and compared with the dense model as reference.

    Texts and items share rows if `search.evaluation.shared_rows` finds that this changes nothing in the model.
    Otherwise every text and every branch has a row of its own.

    Args:
        sequences: texts and items with at least one prediction among them.
        model: the model, or any other of its architecture on the same device.
        batch_tokens: most tokens in one forward pass, padding included; a longer sequence forms a batch of its own.
        mixed: order the batches so that the first ones represent all of them (texts and items, short and long), at the
            cost of some padding. Otherwise rows of similar length are batched together.
        identity: as for `search.evaluation.shared_rows.shares_rows`.

    Raises:
        ValueError: there is nothing to score.
    """

    def __init__(
        self,
        sequences: Sequence[Packed],
        model: nn.Module,
        batch_tokens: int = 1024,
        mixed: bool = False,
        identity: Mapping[str, str] | None = None,
    ) -> None:
        if not any(len(sequence.tokens) > 1 for sequence in sequences):
            raise Refusal("a workload needs at least one sequence of two tokens or more")
        self.sequences = tuple(sequences)
        self._device, self._mixed = next(model.parameters()).device, mixed
        self._branch_start = _starts([len(sequence.branches) for sequence in sequences])
        counts = torch.tensor([len(sequence.branches) for sequence in sequences])
        self._branch_owner = torch.arange(len(sequences)).repeat_interleave(counts)
        self._is_text = torch.tensor([not sequence.branches for sequence in sequences])
        texts = [text.tokens for sequence in sequences for text in apart(sequence)]
        alone = any(sequence.alone for sequence in sequences)
        longest = max(len(sequence.tokens) for sequence in sequences)
        self._shared = not alone and shares_rows(model, max(texts, key=len), longest, identity)
        self._multiple = _MULTIPLE if rounds_products(next(model.parameters())) else 1
        self._batch_tokens = batch_tokens
        self._batches = self._batched(batch_tokens)

    def halved(self) -> Workload | None:
        """The same workload in batches of half as many tokens, without a reference; None if every batch is one row."""
        rows = [len(batch.inputs["input_ids"]) for batch in self._batches]
        if max(rows) == 1:
            return None
        most = max(batch.inputs["input_ids"].numel() for batch in self._batches)
        smaller = copy(self)
        smaller._batch_tokens = min(self._batch_tokens, most) // 2
        smaller._batches = smaller._batched(smaller._batch_tokens)
        return smaller

    @property
    def has_reference(self) -> bool:
        """Whether `reference` has been called successfully."""
        return all(batch.dense is not None for batch in self._batches)

    @property
    def tokens(self) -> int:
        """Number of tokens of the texts and items, each prefix counted once."""
        return sum(len(sequence.tokens) for sequence in self.sequences)

    @property
    def padded_tokens(self) -> int:
        """Number of tokens that a pass over the workload feeds to the model, including padding."""
        return sum(batch.inputs["input_ids"].numel() for batch in self._batches)

    @torch.no_grad()
    def reference(self, model: nn.Module, run_forward: RunForward = run_directly) -> Quality:
        """Use `model` as the dense reference; returns its own quality, with a KL of 0.

        Args:
            run_forward: as for `measure`.

        Raises:
            ValueError: its logits are not finite.
        """
        return self._pass(model, run_forward, self._refer)

    @torch.no_grad()  # a sharded model does not survive inference mode
    def measure(
        self,
        model: nn.Module,
        run_forward: RunForward = run_directly,
        should_stop: ShouldStop | None = None,
    ) -> Quality:
        """Quality of `model` against the reference. Call `reference` first.

        Args:
            run_forward: runs the forward pass of a batch, given an object that identifies the inputs and a function
                that makes the pass.
            should_stop: called after every batch but the last, with the quality so far and the largest number of
                calls. When it returns True, that quality is the result, in state "raced".
        """
        return self._pass(model, run_forward, should_stop=should_stop)

    def descend(self, model: nn.Module) -> Quality:
        """Backpropagate the mean KL, nats per token, through `model`; the caller collects the gradients.

        Call `reference` first. Gradients must be enabled.

        Returns:
            The quality of `model`, from the same passes, as `measure` gives it.
        """
        tokens = sum(batch.compared for batch in self._batches)

        def backpropagate(batch: _Batch, reading: Reading) -> None:
            assert batch.dense is not None, "call reference first"
            if batch.compared:
                compared = reading.first(batch.compared)
                kl = batch.dense.negentropy - (batch.dense.mean(compared) - compared.logits.logsumexp(-1))
                (kl.sum() / tokens).backward()  # type: ignore[no-untyped-call]

        return self._pass(model, run_directly, backpropagate)

    @torch.inference_mode()
    def continuations(self, model: nn.Module) -> list[list[Continuation]]:
        """Log-likelihoods of all continuations of all items, in order; needs no reference."""
        likelihoods, misses = (torch.zeros(int(self._branch_start[-1]), dtype=torch.float64) for _ in range(2))
        for batch in self._batches:
            scored = batch.branch >= 0
            target, branch = batch.target[scored], batch.branch[scored]
            logits = read(model, batch.inputs, batch.source[scored]).logits
            chosen = logits.gather(-1, target[:, None]).squeeze(-1) - log_normalizer(logits)
            _scatter(likelihoods, branch, chosen)
            _scatter(misses, branch, logits.argmax(-1) != target)
        found = [Continuation(*pair) for pair in zip(likelihoods.tolist(), (misses == 0).tolist(), strict=True)]
        starts = zip(self._branch_start[:-1], self._branch_start[1:], strict=True)
        return [found[start:stop] for start, stop in starts if stop > start]

    def _pass(
        self,
        model: nn.Module,
        run_forward: RunForward,
        before: Callable[[_Batch, Reading], None] | None = None,
        should_stop: ShouldStop | None = None,
    ) -> Quality:
        """Make one forward pass over all batches; `before` is called with each reading before it is measured."""
        count = len(self.sequences)
        totals = {
            name: torch.zeros(count, dtype=torch.float64)
            for name in ("kl", "agree", "compared", "nll", "scored", "branches")
        }
        choices = torch.zeros(int(self._branch_start[-1]), dtype=torch.float64)
        checks = len(self._batches) - 1
        for number, batch in enumerate(self._batches):
            reading = run_forward(batch, partial(read, model, batch.inputs, batch.source))
            if before is not None:
                before(batch, reading)
            with torch.no_grad():
                result = self._measure_batch(batch, reading)
            if result is None:
                return Quality()
            for name, values in result[0].items():
                totals[name] += values
            choices += result[1]
            if should_stop is not None and number < checks and should_stop(self._quality(totals, choices), checks):
                return replace(self._quality(totals, choices), state="raced")
        return self._quality(totals, choices)

    @staticmethod
    def _refer(batch: _Batch, reading: Reading) -> None:
        compared = reading.first(batch.compared)
        if not torch.isfinite(compared.logits).all():
            raise Refusal("the dense model gives NaN or infinite logits, so no model can be compared with it")
        batch.dense = Dense(compared)

    def _measure_batch(self, batch: _Batch, reading: Reading) -> tuple[dict[str, torch.Tensor], torch.Tensor] | None:
        assert batch.dense is not None, "call reference first"
        normalizer = log_normalizer(reading.logits)
        if not torch.isfinite(normalizer).all():
            return None
        chosen = reading.logits.gather(-1, batch.target[:, None]).squeeze(-1) - normalizer
        compared = reading.first(batch.compared)
        kl = batch.dense.negentropy - (batch.dense.mean(compared) - normalizer[: batch.compared])
        agree = compared.logits.argmax(-1) == batch.dense.choice
        owner = batch.owner[: batch.compared]
        text = self._is_text[batch.owner.cpu()]
        branches = batch.branch[batch.branch >= 0].cpu().bincount(minlength=len(self._branch_owner)) > 0
        contributions: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
            "kl": (owner, kl),
            "agree": (owner, agree),
            "compared": (owner, torch.ones_like(kl)),
            "nll": (batch.owner, torch.where(text, -chosen.cpu().double(), 0.0)),
            "scored": (batch.owner, text),
            "branches": (self._branch_owner, branches),
        }
        sums = {
            name: _scatter(torch.zeros(len(self.sequences), dtype=torch.float64), place, values)
            for name, (place, values) in contributions.items()
        }
        choices = _scatter(torch.zeros(int(self._branch_start[-1]), dtype=torch.float64), batch.branch, chosen)
        return sums, choices

    def _quality(self, totals: dict[str, torch.Tensor], choices: torch.Tensor) -> Quality:
        counted = torch.tensor([not sequence.aside for sequence in self.sequences])
        kl, agree, tokens = (totals[name] * counted for name in ("kl", "agree", "compared"))
        used = tokens > 0
        quality = Quality(
            state="ok",
            kl=float(kl.sum() / tokens.sum()),
            kl_standard_error=ratio_standard_error(kl[used], tokens[used]),
            agreement=float(agree.sum() / tokens.sum()),
            tokens=int(tokens.sum()),
            kl_by_sequence=tuple(kl.tolist()),
            tokens_by_sequence=tuple(int(value) for value in tokens.tolist()),
        )
        corpora = dict.fromkeys(sequence.corpus for sequence in self.sequences if sequence.corpus)
        quality = replace(
            quality,
            perplexity=_perplexity(totals, used),
            by_corpus=tuple(self._corpus(name, totals) for name in corpora),
        )
        items = [
            (choices[start:stop], sequence.answer)
            for sequence, seen, start, stop in zip(
                self.sequences, totals["branches"], self._branch_start[:-1], self._branch_start[1:], strict=True
            )
            if sequence.answer is not None and int(seen) == stop - start
        ]
        if not items:
            return quality
        correct = torch.stack([values.softmax(0)[answer] for values, answer in items])
        right = torch.tensor([float(values.argmax() == answer) for values, answer in items], dtype=torch.float64)
        margins = [
            float(values[answer] - torch.cat([values[:answer], values[answer + 1 :]]).max())
            for values, answer in items
            if len(values) > 1 and answer is not None
        ]
        return replace(
            quality,
            items=len(items),
            accuracy=float(right.mean()),
            accuracy_standard_error=mean_standard_error(right),
            expected_accuracy=float(correct.mean()),
            expected_accuracy_standard_error=mean_standard_error(correct),
            margin=sum(margins) / max(1, len(margins)),
            correct_by_item=tuple(correct.tolist()),
        )

    def _corpus(self, name: str, totals: dict[str, torch.Tensor]) -> CorpusQuality:
        """The figures of the sequences of one corpus that are measured so far."""
        of = torch.tensor([sequence.corpus == name for sequence in self.sequences]) & (totals["compared"] > 0)
        kl, tokens = totals["kl"][of], totals["compared"][of]
        return CorpusQuality(
            name, float(kl.sum() / tokens.sum()), ratio_standard_error(kl, tokens), _perplexity(totals, of)
        )

    def _batched(self, batch_tokens: int) -> list[_Batch]:
        """All sequences in batches. What a row is made of are whole sequences, or the plain texts that they come to."""
        if self._shared:
            parts = [(number, self._branches(number), sequence) for number, sequence in enumerate(self.sequences)]
        else:
            parts = [
                (number, self._branches(number)[place:], text)
                for number, sequence in enumerate(self.sequences)
                for place, text in enumerate(apart(sequence))
            ]
        lengths = [len(sequence.tokens) for _, _, sequence in parts]
        rows = pack(lengths) if self._shared else [[place] for place, length in enumerate(lengths) if length > 1]
        grouped = group(mix(rows, lengths) if self._mixed else rows, lengths, batch_tokens, not self._mixed)
        return [self._batch([[parts[place] for place in row] for row in each]) for each in grouped]

    def _branches(self, number: int) -> range:
        """The global numbers of the branches of a sequence."""
        return range(self._branch_start[number], self._branch_start[number + 1])

    def _batch(self, rows: list[list[tuple[int, range, Packed]]]) -> _Batch:
        """A batch of rows of parts: the number of a sequence, the global numbers of its branches, and its tokens."""
        sequences = [[sequence for _, _, sequence in row] for row in rows]
        longest = max(sum(len(sequence.tokens) for sequence in row) for row in sequences)
        whole = min(-(-longest // self._multiple) * self._multiple, ROW_TOKENS, self._batch_tokens // len(rows))
        inputs = row_inputs(sequences, self._shared, whole)
        found: list[Prediction] = []
        for place, row in enumerate(rows):
            base = place * inputs["input_ids"].shape[1]
            for number, branches, sequence in row:
                found += predictions(sequence, number, base, branches)
                base += len(sequence.tokens)
        found.sort(key=lambda prediction: not prediction.compared)
        source, target, owner, branch = (
            torch.tensor([getattr(prediction, name) for prediction in found], device=self._device)
            for name in ("source", "target", "owner", "branch")
        )
        compared = sum(prediction.compared for prediction in found)
        placed = {name: tensor.to(self._device) for name, tensor in inputs.items()}
        return _Batch(placed, compared, source, target, owner, branch)


def loglikelihoods(model: nn.Module, items: Sequence[Packed], batch_tokens: int = 1024) -> list[list[float]]:
    """Summed log-probability of each continuation of each item, nats."""
    found = Workload(items, model, batch_tokens).continuations(model)
    return [[one.loglikelihood for one in of_item] for of_item in found]


def _scatter(total: torch.Tensor, place: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Add `values` to `total[place]` on the CPU in float64; negative places are skipped."""
    place, values = place.cpu(), values.cpu().double()
    return total.index_add_(0, place[place >= 0], values[place >= 0])


def _starts(lengths: Sequence[int]) -> list[int]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def _perplexity(totals: dict[str, torch.Tensor], of: torch.Tensor) -> float:
    """Perplexity over the tokens of the texts among the sequences `of`; NaN if there are none."""
    count = float(totals["scored"][of].sum())
    if not count:
        return math.nan
    loss = float(totals["nll"][of].sum()) / count
    return math.exp(loss) if loss < 700 else math.inf
