"""Quality: the figures of a model on a workload, and how two of them are compared. Plain values; knows no model."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from compression.refusal import Refusal

__all__ = ["Difference", "Quality", "mean_standard_error", "paired_kl", "ratio_standard_error"]


@dataclass(frozen=True)
class Quality:
    """What a model does on a workload. Non-finite logits give state "nonfinite" and no number.

    Attributes:
        state: "ok", "nonfinite", or "raced" for figures of the first sequences only, where a measurement was given up.
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
        perplexity_by_corpus: (corpus, perplexity) for every corpus that texts name.
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
    perplexity_by_corpus: tuple[tuple[str, float], ...] = ()

    def scalars(self) -> dict[str, Any]:
        """The single figures, without the per-sequence tuples."""
        return {name: value for name, value in asdict(self).items() if not isinstance(value, tuple)}

    def to_row(self) -> dict[str, Any]:
        """The same under the names that `search.reporting.tables` knows, with the perplexity of every corpus."""
        corpora = {f"perplexity_{name}": value for name, value in self.perplexity_by_corpus}
        return {name.replace("standard_error", "stderr"): value for name, value in self.scalars().items()} | corpora


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
        raise Refusal("two qualities can only be compared when both are numbers from the same workload")
    used = [number for number, count in enumerate(first.tokens_by_sequence) if count]
    counts = torch.tensor(first.tokens_by_sequence, dtype=torch.float64)[used]
    sums = [torch.tensor(quality.kl_by_sequence, dtype=torch.float64)[used] for quality in (first, second)]
    value = float((sums[0] - sums[1]).sum() / counts.sum())
    base = float(sums[1].sum() / counts.sum())
    error = ratio_standard_error(sums[0] - sums[1], counts)
    return Difference(value, error, value / base if base else 0.0, len(used))


def mean_standard_error(values: torch.Tensor) -> float:
    """Standard error of the mean of independent values; NaN for fewer than two."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def ratio_standard_error(sums: torch.Tensor, counts: torch.Tensor) -> float:
    """Standard error of Σ sums / Σ counts with sequences as units (linearized ratio estimator)."""
    if len(sums) < 2:
        return math.nan
    residual = sums - counts * (sums.sum() / counts.sum())
    return float(residual.square().sum().sqrt() / counts.sum() * math.sqrt(len(sums) / (len(sums) - 1)))
