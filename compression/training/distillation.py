"""Computes distillation losses without ever holding the logits of all tokens over the whole vocabulary.

Takes tensors and returns tensors. The target at a position is either a row of `Distributions`: the probabilities of all
tokens, computed from the dense model's last hidden state when they are needed; or a row of `Targets`: the
log-probabilities of the k likeliest tokens. For `Targets`, all other tokens together form one more outcome, the rest.
The loss is the KL divergence between the two distributions, for `Targets` over these k + 1 outcomes. It is then a lower
bound of the KL over the vocabulary, and equals it when k is the size of the vocabulary. A label is the case k = 1 with
probability 1, where the KL is the cross-entropy.

Healing freezes the output head, so only the gradient with respect to the inputs of the head is needed. It is computed
in the forward pass, a few rows at a time, as Liger (Hsu et al. 2024) does, and needs memory for these rows only.
Optionally the softmax normalizer is estimated: it is summed exactly over all tokens that are among the k likeliest
anywhere in the current rows, and from a uniform sample of the other tokens, weighted up (importance sampling).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import log
from typing import Any

import torch
from torch.nn import functional

from compression.numerics.finite import is_finite
from compression.refusal import Refusal

__all__ = ["Distributions", "Head", "Targets", "divergence", "labels", "likeliest"]

_NOT_FINITE = "the dense model gives NaN or infinite logits; nothing can be learned from it"
_ROWS, _SAMPLED_ROWS = 64, 256
"""Smallest number of rows of logits computed at a time, and on a CPU with sampled tokens."""
_ROOM = {"cpu": 2**24, "cuda": 2**30}
"""Bytes of float32 logits computed at a time, by device. Matrix products are more efficient with many rows; a CPU gets
larger pieces of memory anew from the system every time, which takes longer than the products."""


@dataclass(frozen=True, eq=False)
class Head:
    """Maps hidden states h to logits, frozen: s·(W h + b), or c·tanh(s·(W h + b) / c) with a cap c, as in Gemma 2.

    Attributes:
        weight: W (vocabulary, width).
        bias: b (vocabulary,), or None.
        scale: s, above 0.
        cap: c, above 0, or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns float32 logits (rows, vocabulary) of `hidden` (rows, width)."""
        logits = self._linear(hidden)
        if self.scale != 1:
            logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float | None:
        """Returns the derivative of logits, as `logits` returns them, with respect to W h + b; None if it is 1."""
        if self.cap is None:
            return None if self.scale == 1 else self.scale
        return self.scale * (1 - (logits / self.cap).square())

    def _linear(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden, weight = hidden.to(self.weight.dtype), self.weight
        if not (weight.is_cuda and weight.dtype == torch.bfloat16):
            return functional.linear(hidden, weight, self.bias).float()
        # The product accumulates in float32; keeping that result avoids rounding a logit of 20 to the nearest eighth.
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return logits if self.bias is None else logits.add_(self.bias)

    def only(self, tokens: torch.Tensor) -> Head:
        """Returns the head restricted to some tokens (n,)."""
        return replace(self, weight=self.weight[tokens], bias=None if self.bias is None else self.bias[tokens])


@dataclass(frozen=True, eq=False)
class Targets:
    """Holds the distributions to learn at T positions.

    Attributes:
        tokens: int64 (T, k), distinct within a row.
        logs: float32 (T, k), log-probabilities of `tokens`. The remaining probability belongs to the rest.
    """

    tokens: torch.Tensor
    logs: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | torch.Tensor) -> Targets:
        return Targets(self.tokens[rows], self.logs[rows])


@dataclass(frozen=True, eq=False)
class Distributions:
    """Holds the distributions over the whole vocabulary to learn at T positions.

    Attributes:
        hidden: what the head of the dense model reads, (T, width).
        head: that head.
    """

    hidden: torch.Tensor
    head: Head

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: slice | torch.Tensor) -> Distributions:
        return Distributions(self.hidden[rows], self.head)

    def logs(self) -> torch.Tensor:
        """Returns the log-probabilities of all tokens, float32 (T, vocabulary).

        Raises:
            ValueError: they are not finite.
        """
        logs = self.head.logits(self.hidden)
        logs -= logs.logsumexp(-1, keepdim=True)
        if not is_finite(logs):
            raise Refusal(_NOT_FINITE)
        return logs


def labels(tokens: torch.Tensor) -> Targets:
    """Returns targets that give known next tokens (T,) probability 1."""
    return Targets(tokens[:, None], torch.zeros(len(tokens), 1, device=tokens.device))


@torch.no_grad()
def likeliest(hidden: torch.Tensor, head: Head, count: int) -> Targets:
    """Returns the `count` likeliest tokens at each position, for a model whose head reads `hidden` (T, width).

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
            raise Refusal(_NOT_FINITE)
        tokens.append(places)
        logs.append(values - normalizer)
    return Targets(torch.cat(tokens), torch.cat(logs))


def divergence(
    hidden: torch.Tensor,
    head: Head,
    targets: Targets | Distributions,
    sample: int = 0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Returns the sum over rows of KL(targets ‖ softmax(head(hidden))) in nats, differentiable in `hidden`.

    Args:
        hidden: (T, width).
        targets: targets at the same T positions.
        sample: number of sampled tokens that represent all tokens which are no target in the current rows. 0 computes
            all logits, which also happens for `Distributions` and if there are at most `sample` such tokens.
        generator: draws the sample; on the device of `hidden`.
    """
    result: torch.Tensor = _Divergence.apply(hidden, head, targets, sample, generator)  # type: ignore[no-untyped-call]
    return result


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: Head,
        targets: Targets | Distributions,
        sample: int,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        slopes = torch.empty_like(hidden)
        for rows in _slices(len(hidden), head, bool(sample) and isinstance(targets, Targets)):
            part, known, shortlist = targets[rows], head, None
            if sample and isinstance(part, Targets):
                shortlist = _shortlist(part.tokens, len(head.weight), sample, generator)
            if shortlist is not None and isinstance(part, Targets):
                part, known = Targets(shortlist.places, part.logs), head.only(shortlist.tokens)
            logits = known.logits(hidden[rows])
            slope = known.slope(logits)
            if shortlist is not None:
                logits[:, -sample:] += shortlist.weight
            total += _divergence_(logits, part) if isinstance(part, Targets) else _whole_divergence_(logits, part)
            if slope is not None:
                logits *= slope
            slopes[rows] = (logits.to(known.weight.dtype) @ known.weight).to(slopes.dtype)
        ctx.save_for_backward(slopes)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return slopes * gradients[0].to(slopes.dtype), None, None, None, None


def _whole_divergence_(logits: torch.Tensor, targets: Distributions) -> torch.Tensor:
    """Returns the sum of the divergences of all rows, and overwrites the logits with its gradient."""
    wanted = targets.logs()
    logits -= logits.logsumexp(-1, keepdim=True)
    probabilities = wanted.exp()
    value = (probabilities * wanted.sub_(logits)).sum()
    logits.exp_().sub_(probabilities)
    return value


def _divergence_(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Returns the sum of the divergences of all rows, and overwrites the logits with its gradient."""
    # Works in place and takes one exponential of every logit: the matrix is large and passes over it dominate the cost.
    largest = logits.amax(-1, keepdim=True)
    chosen = logits.gather(1, targets.tokens) - largest
    normalizer = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    chosen -= normalizer.log()
    wanted, given = targets.logs.exp(), chosen.exp()
    tiny = torch.finfo(torch.float32).eps
    rest, left = ((1 - one.sum(1, keepdim=True)).clamp_min(0) for one in (wanted, given))
    left = left.clamp_min(tiny)
    value = (wanted * (targets.logs - chosen)).sum() + (rest * (rest.clamp_min(tiny) / left).log()).sum()
    # The gradient for a token j of the rest is q_j − rest·q_j / left, since the rest's wanted probability is shared in
    # proportion to q_j. The gradients of a row sum to 0.
    logits.mul_((1 - rest / left) / normalizer)
    logits.scatter_(1, targets.tokens, given - wanted)
    return value


@dataclass(frozen=True, eq=False)
class _Shortlist:
    """Lists the tokens whose logits are computed.

    Attributes:
        tokens: the target tokens, then the sampled ones.
        places: position in `tokens` of every target, shaped as the targets.
        weight: natural logarithm of the number of tokens that each sampled token represents.
    """

    tokens: torch.Tensor
    places: torch.Tensor
    weight: float


def _shortlist(
    wanted: torch.Tensor, vocabulary: int, sample: int, generator: torch.Generator | None
) -> _Shortlist | None:
    """Returns all target tokens and a sample of the others; None if there are at most `sample` others."""
    place = torch.full((vocabulary,), -1, device=wanted.device)
    place[wanted.flatten()] = 0
    exact, others = (place == 0).nonzero()[:, 0], (place < 0).nonzero()[:, 0]
    if len(others) <= sample:
        return None
    place[exact] = torch.arange(len(exact), device=wanted.device)
    drawn = others[torch.randint(len(others), (sample,), generator=generator, device=wanted.device)]
    return _Shortlist(torch.cat((exact, drawn)), place[wanted], log(len(others) / sample))


def _slices(count: int, head: Head, sampled: bool = False) -> Iterator[slice]:
    """Yields slices of `count` rows. With sampling, a CPU takes few rows at a time, as their shortlist is shorter."""
    device = head.weight.device.type
    size = max(_ROWS, _ROOM.get(device, _ROOM["cuda"]) // (4 * len(head.weight)))
    if device == "cpu" and sampled:
        size = _SAMPLED_ROWS
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
