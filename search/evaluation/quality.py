"""Hold the quality metrics of a model on a workload, and compare two of them. Plain values; does not know models."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from compression.refusal import Refusal

__all__ = ["CorpusQuality", "Difference", "Quality", "mean_standard_error", "paired_kl", "ratio_standard_error"]


@dataclass(frozen=True)
class CorpusQuality:
    """The quality of a model on the texts or items of one corpus.

    Attributes:
        name: name of the corpus.
        kl: mean over scored tokens of KL(dense ‖ model), nats per token.
        kl_standard_error: standard error of `kl`, with texts or items as the sampling unit.
        perplexity: exp of the mean negative log-likelihood of the scored tokens; NaN for items.
    """

    name: str
    kl: float
    kl_standard_error: float
    perplexity: float

    def to_row(self) -> dict[str, float]:
        """The figures under column names, such as `kl_prose`."""
        row = {f"kl_{self.name}": self.kl, f"kl_{self.name}_stderr": self.kl_standard_error}
        return row if math.isnan(self.perplexity) else row | {f"perplexity_{self.name}": self.perplexity}


@dataclass(frozen=True)
class Quality:
    """The quality of a model on a workload. Non-finite logits give the state "nonfinite" and no numbers.

    Attributes:
        state: "ok"; "nonfinite"; or "raced" if the measurement was stopped early, with metrics of its first sequences.
        kl: mean over scored tokens of KL(dense ‖ model), nats per token.
        kl_standard_error: standard error of `kl`, with sequences as the sampling unit.
        perplexity: exp of the mean negative log-likelihood over the tokens of the texts.
        accuracy: share of items whose likeliest continuation (summed log-probability) is the correct one.
        expected_accuracy: mean probability of the correct continuation among the choices, P(correct).
        margin: mean log-probability of the correct continuation minus the best other one, nats.
        agreement: share of scored tokens where the likeliest next token is the dense model's.
        items, tokens: numbers of scored items and tokens.
        kl_by_sequence, tokens_by_sequence: summed KL and number of scored tokens per sequence, for paired comparisons.
        correct_by_item: P(correct) per item, for paired comparisons.
        by_corpus: figures of every named corpus in the workload. Sequences that are `aside` count here alone; in
            `kl_by_sequence` and `tokens_by_sequence` they have zeros.
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
    by_corpus: tuple[CorpusQuality, ...] = ()

    def scalars(self) -> dict[str, Any]:
        """The scalar values, without the tuples."""
        return {name: value for name, value in asdict(self).items() if not isinstance(value, tuple)}

    def to_row(self) -> dict[str, Any]:
        """The scalar values and those of the corpora, under the column names that `search.reporting.tables` uses."""
        row = {name.replace("standard_error", "stderr"): value for name, value in self.scalars().items()}
        for corpus in self.by_corpus:
            row |= corpus.to_row()
        return row


@dataclass(frozen=True)
class Difference:
    """The difference of two mean KLs on the same sequences, nats per token.

    Attributes:
        value: first KL minus second.
        standard_error: standard error of `value`, with sequences as the sampling unit; NaN for fewer than two.
        relative: `value` divided by the second KL; 0 if that is 0.
        sequences: number of sequences.
    """

    value: float
    standard_error: float
    relative: float
    sequences: int


def paired_kl(first: Quality, second: Quality) -> Difference:
    """KL of `first` minus KL of `second`, both measured on the same workload.

    Raises:
        ValueError: either has no numbers, or they come from different workloads.
    """
    if first.state != "ok" or second.state != "ok" or first.tokens_by_sequence != second.tokens_by_sequence:
        raise Refusal("two qualities can only be compared if both have numbers from the same workload")
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
    """Standard error of Σ sums / Σ counts, with sequences as the sampling unit (linearized ratio estimator)."""
    if len(sums) < 2:
        return math.nan
    residual = sums - counts * (sums.sum() / counts.sum())
    return float(residual.square().sum().sqrt() / counts.sum() * math.sqrt(len(sums) / (len(sums) - 1)))
