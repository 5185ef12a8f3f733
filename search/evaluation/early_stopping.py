"""Racing: when a schedule may be given up before it is measured to the end. Numbers only; knows no model."""

from __future__ import annotations

from statistics import NormalDist

import torch

from compression.refusal import Refusal
from search.evaluation.quality import Quality, ratio_standard_error

__all__ = ["LEVEL", "clearly_worse", "student_quantile"]

LEVEL = 0.05
"""Probability of giving up a schedule that is no worse than its rival."""
_LEAST = 8  # sequences before a standard error is worth anything


def clearly_worse(partial: Quality, rival: Quality, checks: int, level: float = LEVEL) -> bool:
    """Whether a schedule measured on some sequences so far has a larger KL than a rival measured on all of them.

    A one-sided paired t-test: with d the difference of mean KL per token over the sequences seen by both (a ratio
    estimate, sequences as units) and s its standard error, worse is
    d − t(1 − level / looks, n − 1)·s > 0. By Bonferroni over the looks, a schedule that is no worse is given up with
    probability at most `level`, as far as differences are near normal and the sequences seen are as good as drawn at
    random from those the rival was measured on. No decision below 8 sequences.

    Args:
        partial: figures of the sequences seen so far, no tokens for the others.
        rival: figures of all sequences.
        checks: how often this is asked at most in one measurement, at least 1.
        level: 0 < level < 1.

    Raises:
        ValueError: the rival was measured on other sequences, or not in full.
    """
    used = [number for number, count in enumerate(partial.tokens_by_sequence) if count]
    counts = [quality.tokens_by_sequence for quality in (partial, rival)]
    if rival.state != "ok" or any(counts[0][number] != counts[1][number] for number in used):
        raise Refusal("a schedule can only race against one measured in full on the same workload")
    if len(used) < _LEAST:
        return False
    tokens = torch.tensor(counts[0], dtype=torch.float64)[used]
    sums = [torch.tensor(quality.kl_by_sequence, dtype=torch.float64)[used] for quality in (partial, rival)]
    difference = sums[0] - sums[1]
    bound = student_quantile(1 - level / checks, len(used) - 1) * ratio_standard_error(difference, tokens)
    return float(difference.sum() / tokens.sum()) > bound


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t by its expansion in 1 / freedom (Abramowitz & Stegun 26.7.5).

    Relative error below 0.1 % for a freedom of at least 7 and 0.5 < probability ≤ 0.999.
    """
    z = NormalDist().inv_cdf(probability)
    terms: tuple[float, ...] = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(freedom) ** power for power, term in enumerate(terms, 1))
