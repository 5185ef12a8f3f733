"""Scoring: what one forward pass over a fixed workload says about a model, against the dense model.

Knows token sequences, a causal language model and its logits; nothing of schedules or files. The answer choices of an
item share one forward pass over their common prefix: they follow it side by side as branches that see the prefix and
themselves only. Sequences are packed into rows in which none sees another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

__all__ = [
    "Difference",
    "Quality",
    "Sequence_",
    "Workload",
    "loglikelihoods",
    "packed_item",
    "packed_text",
    "paired_kl",
]


@dataclass(frozen=True)
class Sequence_:
    """One packed sequence.

    Attributes:
        tokens: prefix, then the branches one after the other.
        prefix: length of the prefix; equal to the number of tokens for plain text.
        branches: per branch (start, stop, first scored), positions in `tokens`.
        answer: index of the correct branch, or None for text.
    """

    tokens: tuple[int, ...]
    prefix: int
    branches: tuple[tuple[int, int, int], ...] = ()
    answer: int | None = None


def packed_text(tokens: Sequence[int]) -> Sequence_:
    """Plain text: every token after the first is scored."""
    return Sequence_(tuple(tokens), len(tokens))


def packed_item(
    encode: Callable[[str], list[int]], context: str, continuations: Sequence[str], answer: int
) -> Sequence_:
    """A multiple-choice item. Tokenized as lm-eval does: context and continuation together, cut at the length of the
    context alone, spaces at the end of the context moved to the continuation.

    Raises:
        ValueError: an empty context or continuation, or an answer that is no index of a continuation.
    """
    if not context.strip() or not all(continuations):
        raise ValueError(f"an item needs a context and continuations that are not empty, got {context!r}")
    if not 0 <= answer < len(continuations):
        raise ValueError(f"answer must be an index below {len(continuations)}, got {answer}")
    spaces = context[len(context.rstrip()) :]
    context = context.rstrip()
    start = len(encode(context))
    wholes = [encode(context + spaces + continuation) for continuation in continuations]
    shared = min(start, *(len(whole) - 1 for whole in wholes))
    while shared > 1 and len({tuple(whole[:shared]) for whole in wholes}) > 1:
        shared -= 1
    tokens = list(wholes[0][:shared])
    branches = []
    for whole in wholes:
        first = len(tokens) + min(start, len(whole) - 1) - shared
        branches.append((len(tokens), len(tokens) + len(whole) - shared, first))
        tokens += whole[shared:]
    return Sequence_(tuple(tokens), shared, tuple(branches), answer)


@dataclass(frozen=True)
class Quality:
    """What a model does on a workload. Non-finite logits give state "nonfinite" and no number.

    Attributes:
        state: "ok" or "nonfinite".
        kl: mean over scored tokens of KL(dense ‖ model), nats per token.
        kl_standard_error: of `kl`, over sequences as the sampling unit.
        perplexity: exp of the mean negative log-likelihood over the tokens of the texts.
        accuracy: share of items whose likeliest continuation (summed log-probability) is the correct one.
        expected_accuracy: mean probability of the correct continuation among the choices, P(correct).
        margin: mean log-probability of the correct continuation minus the best other one, nats.
        agreement: share of scored tokens where the likeliest next token is the dense model's.
        items, tokens: how many were scored.
        kl_by_sequence, tokens_by_sequence: sums and counts per sequence, for paired comparisons.
        correct_by_item: P(correct) per item, for paired comparisons.
    """

    state: str = "nonfinite"
    kl: float = math.nan
    kl_standard_error: float = math.nan
    perplexity: float = math.nan
    accuracy: float = math.nan
    accuracy_standard_error: float = math.nan
    expected_accuracy: float = math.nan
    expected_accuracy_standard_error: float = math.nan
    margin: float = math.nan
    agreement: float = math.nan
    items: int = 0
    tokens: int = 0
    kl_by_sequence: tuple[float, ...] = field(default=(), repr=False)
    tokens_by_sequence: tuple[int, ...] = field(default=(), repr=False)
    correct_by_item: tuple[float, ...] = field(default=(), repr=False)

    def scalars(self) -> dict[str, Any]:
        """The single figures, without the per-sequence tuples."""
        return {name: value for name, value in asdict(self).items() if not isinstance(value, tuple)}


@dataclass(frozen=True)
class Difference:
    """A difference of two mean KLs on the same sequences, nats per token.

    Attributes:
        value: first minus second.
        standard_error: of `value`, sequences as the sampling unit; NaN for fewer than two.
        relative: `value` over the second's KL; 0 where that is 0.
        sequences: how many.
    """

    value: float
    standard_error: float
    relative: float
    sequences: int


def paired_kl(first: Quality, second: Quality) -> Difference:
    """KL of `first` minus KL of `second`, both measured on one workload.

    Raises:
        ValueError: either has no numbers, or they come from different workloads.
    """
    if first.state != "ok" or second.state != "ok" or first.tokens_by_sequence != second.tokens_by_sequence:
        raise ValueError("two qualities can only be compared when both are numbers from the same workload")
    used = [number for number, count in enumerate(first.tokens_by_sequence) if count]
    counts = torch.tensor(first.tokens_by_sequence, dtype=torch.float64)[used]
    sums = [torch.tensor(quality.kl_by_sequence, dtype=torch.float64)[used] for quality in (first, second)]
    value = float((sums[0] - sums[1]).sum() / counts.sum())
    base = float(sums[1].sum() / counts.sum())
    error = _ratio_standard_error(sums[0] - sums[1], counts)
    return Difference(value, error, value / base if base else 0.0, len(used))


@dataclass(eq=False)
class _Batch:
    """Rows of packed sequences, and where each prediction is read and what it is compared with.

    Predictions that count for KL and agreement (prefix and correct answer) come first, `compared` of them.
    """

    inputs: dict[str, torch.Tensor]
    source: torch.Tensor  # flat position whose logits predict …
    target: torch.Tensor  # … this token
    owner: torch.Tensor  # sequence number of each prediction
    branch: torch.Tensor  # global branch number of a scored continuation token, -1 elsewhere
    compared: int
    dense_probability: torch.Tensor | None = None
    dense_negentropy: torch.Tensor | None = None
    dense_choice: torch.Tensor | None = None


class Workload:
    """A fixed set of texts and items, tokenized, batched and referenced to the dense model once.

    Args:
        sequences: texts and items; at least one prediction among them.
        device: where the model runs.
        batch_tokens: upper limit of tokens in one forward pass, padding included; a longer sequence goes alone.

    Raises:
        ValueError: nothing to score.
    """

    def __init__(self, sequences: Sequence[Sequence_], device: torch.device, batch_tokens: int = 1024) -> None:
        if not any(len(sequence.tokens) > 1 for sequence in sequences):
            raise ValueError("a workload needs at least one sequence of two tokens or more")
        self.sequences = tuple(sequences)
        self._branch_start = _starts([len(sequence.branches) for sequence in sequences])
        lengths = [len(sequence.tokens) for sequence in sequences]
        self._batches = [self._batch(rows, device) for rows in _group(_pack(lengths), lengths, batch_tokens)]

    @property
    def tokens(self) -> int:
        """Tokens that one pass feeds to the model, padding not counted."""
        return sum(len(sequence.tokens) for sequence in self.sequences)

    @torch.inference_mode()
    def reference(self, model: nn.Module) -> Quality:
        """Take `model` as the dense reference and return its own quality (kl 0).

        Raises:
            ValueError: its logits are not finite.
        """
        return self._pass(model, self._refer)

    @torch.inference_mode()
    def measure(self, model: nn.Module) -> Quality:
        """Quality of `model` against the reference. Call `reference` first."""
        return self._pass(model, lambda batch, logits: None)

    @torch.inference_mode()
    def choice_loglikelihoods(self, model: nn.Module) -> list[list[float]]:
        """Summed log-probability of every continuation of every item, in order; needs no reference."""
        choices = torch.zeros(int(self._branch_start[-1]), dtype=torch.float64)
        for batch in self._batches:
            logits = _logits(model, batch).float()
            chosen = _log_probability(logits, batch.target)
            _scatter(choices, batch.branch, chosen)
        return [
            choices[start:stop].tolist()
            for start, stop in zip(self._branch_start[:-1], self._branch_start[1:], strict=True)
            if stop > start
        ]

    def _pass(self, model: nn.Module, before: Callable[[_Batch, torch.Tensor], None]) -> Quality:
        """One forward pass over all batches; `before` sees the logits of each before they are measured."""
        count = len(self.sequences)
        totals = {
            name: torch.zeros(count, dtype=torch.float64) for name in ("kl", "agree", "compared", "nll", "scored")
        }
        choices = torch.zeros(int(self._branch_start[-1]), dtype=torch.float64)
        for batch in self._batches:
            logits = _logits(model, batch).float()
            before(batch, logits)
            result = self._measure_batch(batch, logits)
            if result is None:
                return Quality()
            for name, values in result[0].items():
                totals[name] += values
            choices += result[1]
        return self._quality(totals, choices)

    @staticmethod
    def _refer(batch: _Batch, logits: torch.Tensor) -> None:
        compared = logits[: batch.compared]
        if not torch.isfinite(compared).all():
            raise ValueError("the dense model gives NaN or infinite logits; nothing can be compared with it")
        batch.dense_choice = compared.argmax(-1)
        batch.dense_probability = torch.softmax(compared, -1)
        # By the same arithmetic as the cross term, so that rounding cancels and the dense model has a KL of exactly 0.
        batch.dense_negentropy = torch.linalg.vecdot(batch.dense_probability, compared) - torch.logsumexp(compared, -1)

    def _measure_batch(
        self, batch: _Batch, logits: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor] | None:
        assert batch.dense_probability is not None, "call reference first"
        assert batch.dense_negentropy is not None
        assert batch.dense_choice is not None
        normalizer = torch.logsumexp(logits, -1)
        if not torch.isfinite(normalizer).all():
            return None
        chosen = logits.gather(-1, batch.target[:, None]).squeeze(-1) - normalizer
        compared = logits[: batch.compared]
        cross = torch.linalg.vecdot(batch.dense_probability, compared) - normalizer[: batch.compared]
        kl = batch.dense_negentropy - cross
        agree = compared.argmax(-1) == batch.dense_choice
        owner = batch.owner[: batch.compared]
        text = torch.tensor([not sequence.branches for sequence in self.sequences])[batch.owner.cpu()]
        contributions: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
            "kl": (owner, kl),
            "agree": (owner, agree),
            "compared": (owner, torch.ones_like(kl)),
            "nll": (batch.owner, torch.where(text, -chosen.cpu().double(), 0.0)),
            "scored": (batch.owner, text),
        }
        sums = {
            name: _scatter(torch.zeros(len(self.sequences), dtype=torch.float64), place, values)
            for name, (place, values) in contributions.items()
        }
        choices = _scatter(torch.zeros(int(self._branch_start[-1]), dtype=torch.float64), batch.branch, chosen)
        return sums, choices

    def _quality(self, totals: dict[str, torch.Tensor], choices: torch.Tensor) -> Quality:
        tokens = totals["compared"]
        used = tokens > 0
        kl = float(totals["kl"].sum() / tokens.sum())
        quality = Quality(
            state="ok",
            kl=kl,
            kl_standard_error=_ratio_standard_error(totals["kl"][used], tokens[used]),
            agreement=float(totals["agree"].sum() / tokens.sum()),
            tokens=int(tokens.sum()),
            kl_by_sequence=tuple(totals["kl"].tolist()),
            tokens_by_sequence=tuple(int(value) for value in tokens.tolist()),
        )
        if float(totals["scored"].sum()) > 0:
            quality = replace(quality, perplexity=_exp(float(totals["nll"].sum() / totals["scored"].sum())))
        items = [
            (choices[start:stop], sequence.answer)
            for sequence, start, stop in zip(
                self.sequences, self._branch_start[:-1], self._branch_start[1:], strict=True
            )
            if sequence.answer is not None
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
            accuracy_standard_error=_mean_standard_error(right),
            expected_accuracy=float(correct.mean()),
            expected_accuracy_standard_error=_mean_standard_error(correct),
            margin=sum(margins) / max(1, len(margins)),
            correct_by_item=tuple(correct.tolist()),
        )

    def _batch(self, rows: list[list[int]], device: torch.device) -> _Batch:
        length = max(sum(len(self.sequences[number].tokens) for number in row) for row in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        positions = torch.zeros(len(rows), length, dtype=torch.long)
        visible = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)
        predictions: list[_Prediction] = []
        for place, row in enumerate(rows):
            start = 0
            for number in row:
                sequence = self.sequences[number]
                span = slice(start, start + len(sequence.tokens))
                ids[place, span] = torch.tensor(sequence.tokens)
                positions[place, span], visible[place, span, span] = _layout(sequence)
                branches = range(self._branch_start[number], self._branch_start[number + 1])
                predictions += _predictions(sequence, number, place * length + start, branches)
                start = span.stop
        predictions.sort(key=lambda prediction: not prediction.compared)
        columns = {
            name: torch.tensor([getattr(prediction, name) for prediction in predictions], device=device)
            for name in ("source", "target", "owner", "branch")
        }
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": visible[:, None]}
        return _Batch(
            inputs={name: tensor.to(device) for name, tensor in inputs.items()},
            compared=sum(prediction.compared for prediction in predictions),
            **columns,
        )


def loglikelihoods(
    model: nn.Module, items: Sequence[Sequence_], device: torch.device, batch_tokens: int = 1024
) -> list[list[float]]:
    """Summed log-probability of each continuation of each item, nats."""
    return Workload(items, device, batch_tokens).choice_loglikelihoods(model)


def _logits(model: nn.Module, batch: _Batch) -> torch.Tensor:
    """Logits (predictions, vocabulary): the head is given only the positions that are read."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda module, args: (args[0].flatten(0, 1)[batch.source][None],))
    try:
        logits = model(**batch.inputs, use_cache=False).logits
    finally:
        hook.remove()
    assert isinstance(logits, torch.Tensor)
    return logits[0]


def _log_probability(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return logits.gather(-1, target[:, None]).squeeze(-1) - torch.logsumexp(logits, -1)


def _scatter(total: torch.Tensor, place: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Add `values` to `total[place]` on the CPU in float64; negative places are left out."""
    place, values = place.cpu(), values.cpu().double()
    return total.index_add_(0, place[place >= 0], values[place >= 0])


def _starts(lengths: Sequence[int]) -> list[int]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


@dataclass(frozen=True)
class _Prediction:
    """One next-token prediction of a sequence; see `_Batch`."""

    source: int
    target: int
    owner: int
    branch: int
    compared: bool


def _predictions(sequence: Sequence_, number: int, base: int, branches: range) -> list[_Prediction]:
    tokens = sequence.tokens
    found = [_Prediction(base + at - 1, tokens[at], number, -1, True) for at in range(1, sequence.prefix)]
    for index, (start, stop, first) in enumerate(sequence.branches):
        for at in range(start, stop):
            before = sequence.prefix - 1 if at == start else at - 1
            branch = branches[index] if at >= first else -1
            found.append(_Prediction(base + before, tokens[at], number, branch, index == sequence.answer))
    return found


def _layout(sequence: Sequence_) -> tuple[torch.Tensor, torch.Tensor]:
    """Position ids (length,) and visibility (length, length): causal, branches blind to one another."""
    length = len(sequence.tokens)
    positions, visible = torch.arange(length), torch.ones(length, length, dtype=torch.bool).tril()
    for start, stop, _ in sequence.branches:
        positions[start:stop] = torch.arange(sequence.prefix, sequence.prefix + stop - start)
        visible[start:stop, sequence.prefix : start] = False
    return positions, visible


def _pack(lengths: Sequence[int], capacity: int = 256) -> list[list[int]]:
    """Sequence numbers by row, first fit by descending length. A row has room for `capacity` tokens or one sequence.

    Short rows keep attention cheap: a row's sequences do not see each other, but the kernel computes all pairs.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        if lengths[number] < 2:
            continue
        place = next((place for place, left in enumerate(room) if lengths[number] <= left), None)
        if place is None:
            place = len(rows)
            rows.append([])
            room.append(max(capacity, lengths[number]))
        rows[place].append(number)
        room[place] -= lengths[number]
    return rows


def _group(rows: list[list[int]], lengths: Sequence[int], batch_tokens: int) -> Iterator[list[list[int]]]:
    """Rows of similar length, at most `batch_tokens` padded tokens together."""
    group: list[list[int]] = []
    for row in sorted(rows, key=lambda row: sum(lengths[number] for number in row)):
        if group and (len(group) + 1) * sum(lengths[number] for number in row) > batch_tokens:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _mean_standard_error(values: torch.Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _ratio_standard_error(sums: torch.Tensor, counts: torch.Tensor) -> float:
    """Standard error of Σ sums / Σ counts with sequences as units (linearized ratio estimator)."""
    if len(sums) < 2:
        return math.nan
    residual = sums - counts * (sums.sum() / counts.sum())
    return float(residual.square().sum().sqrt() / counts.sum() * math.sqrt(len(sums) / (len(sums) - 1)))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
