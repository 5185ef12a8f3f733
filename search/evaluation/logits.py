"""Reading: logits where they are wanted and nowhere else, and what the dense model says there, kept small.

Knows a causal language model with an output head; nothing of sequences or figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from compression.refusal import Refusal

__all__ = ["Dense", "Reading", "log_normalizer", "read"]

_ROWS = 16
_SHORT_OF_MEMORY = ("cuda",)  # device types


@dataclass(frozen=True, eq=False)
class Reading:
    """What a forward pass gives at the predictions of a batch: logits, and the hidden states that the head was fed."""

    logits: torch.Tensor
    hidden: torch.Tensor
    head: nn.Module

    def first(self, count: int) -> Reading:
        """Of the first `count` predictions."""
        return Reading(self.logits[:count], self.hidden[:count], self.head)


class Dense:
    """What the dense model says of the compared predictions of a batch: probabilities p over the vocabulary.

    Where logits are W h, the mean of other logits under p needs no p: Σ_v p_v (W h)_v = (Wᵀ p)·h, and Wᵀ p is as small
    as a hidden state h. In low precision rounding would not cancel: p is then made again from h on a GPU, where that
    takes no time and memory is short, and kept elsewhere. It is also kept where the head does something else, and made
    again when logits come from another head.
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
            if self._weight.dtype == torch.float32:
                self._embedding = probability @ self._weight
        # By the same arithmetic as in KL, so that rounding cancels and the dense model has a KL of exactly 0.
        self.negentropy = self.mean(reading) - log_normalizer(reading.logits)

    def mean(self, reading: Reading) -> torch.Tensor:
        """Mean logit of another model under the dense probabilities, per prediction.

        Raises:
            ValueError: the head of the dense model was written to since.
        """
        if self._weight is None:
            return _dot(self._probability, reading.logits)
        if self._weight._version != self._version:
            raise Refusal("the output head of the dense model has changed; take the reference again")
        if self._embedding is not None and reading.head.weight is self._weight:
            return _dot(self._embedding, reading.hidden)
        return _dot(torch.softmax(functional.linear(self._hidden, self._weight).float(), -1), reading.logits)


def _plain_weight(reading: Reading) -> torch.Tensor | None:
    """W if the logits are W h in float32, or in low precision on a device of `_SHORT_OF_MEMORY`."""
    if not isinstance(reading.head, nn.Linear) or "bias" in dict(reading.head.named_parameters()):
        return None
    weight, some = reading.head.weight, slice(0, 8)
    exact = weight.dtype == torch.float32
    if weight.is_inference() or not (exact or weight.device.type in _SHORT_OF_MEMORY):
        return None
    given, wanted = functional.linear(reading.hidden[some], weight).float(), reading.logits[some]
    relative, absolute = (1e-4, 1e-3) if exact else (1e-2, 1e-2 * float(wanted.abs().max()))
    return weight if torch.allclose(given, wanted, rtol=relative, atol=absolute) else None


def _dot(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Row by row."""
    result: torch.Tensor = torch.linalg.vecdot(first, second)
    return result


def read(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], source: torch.Tensor, cache: object | None = None
) -> Reading:
    """Of every prediction, in float32: the head is given only the positions that are read.

    Args:
        cache: keys and values of what precedes the inputs, which are appended to it; None keeps none.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    fed: list[torch.Tensor] = []

    def feed(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        fed.append(args[0].flatten(0, 1)[source])
        return (fed[0][None],)

    hook = head.register_forward_pre_hook(feed)
    try:
        logits = model(**inputs, past_key_values=cache, use_cache=cache is not None).logits
    finally:
        hook.remove()
    return Reading(logits[0].float(), fed[0], head)


def log_normalizer(logits: torch.Tensor) -> torch.Tensor:
    """log Σ exp of every row, a few rows at a time on the CPU so that intermediate values stay in its cache."""
    rows = _ROWS if logits.device.type == "cpu" else len(logits)
    return torch.cat([part.logsumexp(-1) for part in torch.split(logits, max(1, rows))])
