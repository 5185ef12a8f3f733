"""Distillation losses that never hold the matrix of all tokens by the whole vocabulary.

Tensors in, tensors out. What is to be learned at a position is a `Targets` row: the log-probabilities of the k
likeliest tokens; all others together are one more outcome, the rest. The loss is the KL divergence between the two
distributions of k + 1 outcomes: a lower bound of the KL over the vocabulary, equal to it when k is its size. A label is
the case k = 1 with probability 1, where the KL is the cross-entropy.

The output head is frozen in healing, so that the gradient with respect to its inputs is all that is needed of it. It is
computed in the forward pass, a few rows at a time, as Liger (Hsu et al. 2024) does; memory is that of a few rows.
Optionally the normalizer is estimated: exact over all tokens that are among the k likeliest anywhere in the rows at
hand, and by a uniform sample of the others, each counting for many (importance sampling).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log
from typing import Any

import torch
from torch.nn import functional

from compression.refusal import Refusal

__all__ = ["Head", "Targets", "divergence", "labels", "likeliest"]

_ROWS = 256
"""Rows of logits at a time, at least."""
_ROOM = {"cpu": 2**28, "cuda": 2**30}
"""Bytes of float32 logits over the whole vocabulary at a time, by device: products want many rows."""


@dataclass(frozen=True, eq=False)
class Head:
    """The frozen linear map from hidden states to logits: W (vocabulary, width), b (vocabulary,) or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits (rows, vocabulary)."""
        hidden, weight = hidden.to(self.weight.dtype), self.weight
        if not (weight.is_cuda and weight.dtype == torch.bfloat16):
            return functional.linear(hidden, weight, self.bias).float()
        # Sums are float32 inside: taken as they are, a logit of 20 is not rounded to the nearest eighth.
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return logits if self.bias is None else logits.add_(self.bias)

    def only(self, tokens: torch.Tensor) -> Head:
        """The head of some tokens."""
        return Head(self.weight[tokens], None if self.bias is None else self.bias[tokens])


@dataclass(frozen=True, eq=False)
class Targets:
    """What is to be predicted at T positions.

    Attributes:
        tokens: int64 (T, k), distinct in a row.
        logs: float32 (T, k), their log-probabilities; what is missing to 1 is the rest's.
    """

    tokens: torch.Tensor
    logs: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | torch.Tensor) -> Targets:
        return Targets(self.tokens[rows], self.logs[rows])


def labels(tokens: torch.Tensor) -> Targets:
    """Known next tokens (T,) as targets."""
    return Targets(tokens[:, None], torch.zeros(len(tokens), 1, device=tokens.device))


@torch.no_grad()
def likeliest(hidden: torch.Tensor, head: Head, count: int) -> Targets:
    """The targets that a model gives whose head reads `hidden` (T, width): its `count` likeliest tokens.

    Raises:
        ValueError: the logits are not finite.
    """
    tokens, logs = [], []
    for rows in _slices(len(hidden), head):
        logits = head.logits(hidden[rows])
        values, places = logits.topk(min(count, logits.shape[1]), sorted=False)
        largest = values.amax(-1, keepdim=True)
        normalizer = largest + logits.sub_(largest).exp_().sum(-1, keepdim=True).log()
        if not torch.isfinite(normalizer).all():
            raise Refusal("the dense model gives NaN or infinite logits; nothing can be learned from it")
        tokens.append(places)
        logs.append(values - normalizer)
    return Targets(torch.cat(tokens), torch.cat(logs))


def divergence(
    hidden: torch.Tensor, head: Head, targets: Targets, sample: int = 0, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Sum over rows of KL(targets ‖ softmax(head(hidden))), nats, differentiable with respect to `hidden`.

    Args:
        hidden: (T, width).
        targets: of the same T positions.
        sample: how many tokens stand for those that are nobody's target; 0 computes all logits, as is done where there
            are no more others than that.
        generator: draws the sample; on the device of `hidden`.
    """
    result: torch.Tensor = _Divergence.apply(hidden, head, targets, sample, generator)  # type: ignore[no-untyped-call]
    return result


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: Head, targets: Targets, sample: int, generator: torch.Generator | None
    ) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        slopes = torch.empty_like(hidden)
        for rows in _slices(len(hidden), head, bool(sample)):
            part, known = targets[rows], head
            shortlist = _shortlist(part.tokens, len(head.weight), sample, generator) if sample else None
            if shortlist is not None:
                part, known = Targets(shortlist.places, part.logs), head.only(shortlist.tokens)
            logits = known.logits(hidden[rows])
            if shortlist is not None:
                logits[:, -sample:] += shortlist.weight
            total += _divergence_(logits, part)
            slopes[rows] = (logits.to(known.weight.dtype) @ known.weight).to(slopes.dtype)
        ctx.save_for_backward(slopes)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return slopes * gradients[0].to(slopes.dtype), None, None, None, None


def _divergence_(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Sum of the divergences of all rows; the logits become its gradient with respect to them."""
    # In place, with one exponential of every logit: the matrix is large, and passes over it are what this costs.
    largest = logits.amax(-1, keepdim=True)
    chosen = logits.gather(1, targets.tokens) - largest
    normalizer = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    chosen -= normalizer.log()
    wanted, given = targets.logs.exp(), chosen.exp()
    tiny = torch.finfo(torch.float32).eps
    rest, left = ((1 - one.sum(1, keepdim=True)).clamp_min(0) for one in (wanted, given))
    left = left.clamp_min(tiny)
    value = (wanted * (targets.logs - chosen)).sum() + (rest * (rest.clamp_min(tiny) / left).log()).sum()
    # Of q_j for a token of the rest, with its share of the rest's mass as probability wanted; a sum of 0 over all j.
    logits.mul_((1 - rest / left) / normalizer)
    logits.scatter_(1, targets.tokens, given - wanted)
    return value


@dataclass(frozen=True, eq=False)
class _Shortlist:
    """Tokens to compute, the sampled ones last; where in it each of the wanted is; ln of how many a sampled one counts
    for."""

    tokens: torch.Tensor
    places: torch.Tensor
    weight: float


def _shortlist(
    wanted: torch.Tensor, vocabulary: int, sample: int, generator: torch.Generator | None
) -> _Shortlist | None:
    """All that are wanted and a sample of the others; None if there are no more others than `sample`."""
    place = torch.full((vocabulary,), -1, device=wanted.device)
    place[wanted.flatten()] = 0
    exact, others = (place == 0).nonzero()[:, 0], (place < 0).nonzero()[:, 0]
    if len(others) <= sample:
        return None
    place[exact] = torch.arange(len(exact), device=wanted.device)
    drawn = others[torch.randint(len(others), (sample,), generator=generator, device=wanted.device)]
    return _Shortlist(torch.cat((exact, drawn)), place[wanted], log(len(others) / sample))


def _slices(count: int, head: Head, sampled: bool = False) -> Iterator[slice]:
    """Pieces of `count` rows; where logits are sampled a processor takes few, whose shortlist is shorter."""
    device, size = head.weight.device.type, _ROWS
    if device != "cpu" or not sampled:
        size = max(size, _ROOM.get(device, _ROOM["cuda"]) // (4 * len(head.weight)))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
