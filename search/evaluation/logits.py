"""Compute logits only at the positions that need them, and store the dense model's predictions compactly.

Knows a causal language model with an output head; does not know sequences or metrics.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional

from compression.numerics.products import float32_pieces, float32_product, products_of, rounds_products
from compression.refusal import Refusal
from compression.training.trainable import captured_head_input

__all__ = ["Dense", "Reading", "cache_argument", "log_normalizer", "read"]

_ROWS = 16
_SHORT_OF_MEMORY = ("cuda",)  # device types
_SOME = 8  # rows that are compared
_SAME = 0.98  # share of logits that are the same, once rounded; the others lie halfway between two numbers
_plain_heads: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Reading:
    """The result of a forward pass at the predictions of a batch.

    Attributes:
        logits: float32 (predictions, vocabulary).
        hidden: input of the output head (predictions, hidden size).
        head: the output head.
    """

    logits: torch.Tensor
    hidden: torch.Tensor
    head: nn.Module

    def first(self, count: int) -> Reading:
        """The reading of the first `count` predictions."""
        return Reading(self.logits[:count], self.hidden[:count], self.head)


class Dense:
    """The dense model's probabilities p over the vocabulary at the compared predictions of a batch.

    If logits are W h in float32, p need not be stored to average other logits W h' under it:
    Σ_v p_v (W h')_v = (Wᵀ p)·h', and Wᵀ p is only as large as a hidden state. In lower precision the rounding errors of
    the two sides would not cancel. On a GPU p is then recomputed from h, which takes little time there. p is stored if
    the head is not a plain linear map, and recomputed if the logits to average come from another head.

    Attributes:
        choice: the likeliest token of each prediction.
        negentropy: Σ_v p_v log p_v of each prediction, nats.
    """

    def __init__(self, reading: Reading) -> None:
        self.choice = reading.logits.argmax(-1)
        probability = torch.softmax(reading.logits, -1)
        self._weight = _plain_weight(reading)
        self._embedding: torch.Tensor | None = None
        if self._weight is None:
            self._probability = probability
        else:
            self._version, self._hidden = self._weight._version, reading.hidden
            self._values = self._weight.detach()  # stays as it is if the model is converted to another dtype
            if _is_exact(self._weight):
                self._embedding = probability.new_zeros(len(probability), self._weight.shape[1])
                for start, piece in float32_pieces(self._values):
                    self._embedding.addmm_(probability[:, start : start + len(piece)], piece)
        # Computed with the same arithmetic as the KL, so that rounding cancels and the dense model's KL is exactly 0.
        self.negentropy = self.mean(reading) - log_normalizer(reading.logits)

    def mean(self, reading: Reading) -> torch.Tensor:
        """Mean logit of another model under the dense probabilities, per prediction.

        Raises:
            ValueError: the output head of the dense model was modified since the reference was taken.
        """
        if self._weight is None:
            return _dot(self._probability, reading.logits)
        if self._weight._version != self._version:
            raise Refusal("the output head of the dense model has changed; take the reference again")
        if self._embedding is not None and reading.head.weight is self._weight:
            return _dot(self._embedding, reading.hidden.float())
        return _dot(torch.softmax(_linear(self._hidden, self._values), -1), reading.logits)


def _plain_weight(reading: Reading) -> torch.Tensor | None:
    """W if the logits are W h in float32, or in lower precision on a device type of `_SHORT_OF_MEMORY`; else None."""
    weight, some = _matrix(reading.head), slice(0, _SOME)
    if weight is None or not len(reading.logits) or weight.is_inference():
        return None
    if not (_is_exact(weight) or weight.device.type in _SHORT_OF_MEMORY):
        return None
    given, wanted = _linear(reading.hidden[some], weight), reading.logits[some]
    exact = _is_exact(weight)
    relative, absolute = (1e-4, 1e-3) if exact else (1e-2, 1e-2 * float(wanted.abs().max()))
    return weight if torch.allclose(given, wanted, rtol=relative, atol=absolute) else None


def _matrix(head: nn.Module) -> torch.Tensor | None:
    """The matrix of a head that is a linear layer without a bias; None for any other."""
    if isinstance(head, nn.Linear) and "bias" not in dict(head.named_parameters()):
        return head.weight
    return None


def _is_exact(weight: torch.Tensor) -> bool:
    """Whether logits of this matrix are computed in float32, from its numbers as they are."""
    return weight.dtype == torch.float32 or rounds_products(weight)


def _linear(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """h Wᵀ (rows, vocabulary) in float32."""
    if not rounds_products(weight):
        return functional.linear(hidden, weight).float()
    result: torch.Tensor = _Product.apply(hidden, weight)  # type: ignore[no-untyped-call]
    return result


class _Product(torch.autograd.Function):
    """`float32_product` with a gradient for the rows."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = hidden.dtype
        return float32_product(hidden, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        total = torch.zeros(len(gradients[0]), weight.shape[1])
        with products_of(weight.dtype):
            for start, piece in float32_pieces(weight):
                total.addmm_(gradients[0][:, start : start + len(piece)], piece)
        return total.to(ctx.dtype), None


def _dot(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Dot products of corresponding rows."""
    result: torch.Tensor = torch.linalg.vecdot(first, second)
    return result


def read(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], source: torch.Tensor, cache: object | None = None
) -> Reading:
    """Make a forward pass and read the logits, in float32, at `source`; the head computes no other positions.

    A model of 16 bits on a CPU rounds its logits. If they are W h, which its first pass shows, they are computed here
    instead, in float32. With a cache, where few positions are read at a time, they are those of the model.

    Args:
        inputs: keyword arguments of the model. A boolean mask (batch, 1, length, length) says what is visible; without
            one, every row is read as one text. An encoder has an integer mask (batch, length), 0 where a row is filled
            up.
        source: flat positions (batch × length) whose logits are read.
        cache: KV cache of the tokens before the inputs; the inputs are appended to it. None uses no cache.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:  # a classifier, which makes one prediction for a row
        logits = model(**inputs).logits.float()[source // inputs["input_ids"].shape[1]]
        return Reading(logits, logits, nn.Identity())
    given: dict[str, object] = dict(_masked(model, inputs))
    if cache is not None:
        given[cache_argument(model)] = cache
    forward = partial(model, **given, use_cache=cache is not None)
    weight, plain = _matrix(head), _plain_heads.get(model)
    if weight is None or not rounds_products(weight) or plain is False or cache is not None:
        return _head_read(forward, head, source)
    if plain:
        with captured_head_input(model) as caught:
            forward()
        hidden = caught[0].flatten(0, 1)[source].to(weight.dtype)
        return Reading(_linear(hidden, weight), hidden, head)
    reading = _head_read(forward, head, source)
    hidden = reading.hidden.to(weight.dtype)
    some = _linear(hidden[:_SOME].detach(), weight)
    if not len(some) or not torch.isfinite(some).all():  # these say nothing about the model
        return reading
    rounded = (each.to(weight.dtype) for each in (some, reading.logits[:_SOME]))
    _plain_heads[model] = float(torch.eq(*rounded).float().mean()) > _SAME
    return Reading(_linear(hidden, weight), hidden, head) if _plain_heads[model] else reading


def _head_read(forward: Callable[[], Any], head: nn.Module, source: torch.Tensor) -> Reading:
    """The logits as the model computes them from what its head gives."""
    fed: list[torch.Tensor] = []

    def feed(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        fed.append(args[0].flatten(0, 1)[source])
        return (fed[0][None],)

    hook = head.register_forward_pre_hook(feed)
    try:
        logits = forward().logits
    finally:
        hook.remove()
    return Reading(logits[0].float(), fed[0], head)


def cache_argument(model: nn.Module) -> str:
    """Name of the argument in which a model takes its KV cache, and of the output that returns it.

    A model without attention, such as Mamba, has a name of its own and ignores the usual one without an error.
    """
    taken = inspect.signature(model.forward).parameters
    return "cache_params" if "cache_params" in taken else "past_key_values"


def _masked(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The inputs with the mask as the attention of the model takes it: "eager" attention adds it to its scores."""
    mask, attention = inputs.get("attention_mask"), getattr(getattr(model, "config", None), "_attn_implementation", "")
    if mask is None or mask.dtype != torch.bool or attention != "eager":
        return inputs
    dtype = next(model.parameters()).dtype
    added = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    return {**inputs, "attention_mask": added}


def log_normalizer(logits: torch.Tensor) -> torch.Tensor:
    """log Σ exp of every row; a few rows at a time on a CPU, so that intermediate values stay in its cache."""
    rows = _ROWS if logits.device.type == "cpu" else len(logits)
    return torch.cat([part.logsumexp(-1) for part in torch.split(logits, max(1, rows))])
