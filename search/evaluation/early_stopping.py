"""Decide when to stop measuring a schedule that is clearly worse than a rival (racing). Knows numbers, no model."""

from __future__ import annotations

from statistics import NormalDist

import torch

from compression.refusal import Refusal
from search.evaluation.quality import Quality, ratio_standard_error

__all__ = ["LEVEL", "clearly_worse", "student_quantile"]

LEVEL = 0.05
"""Probability bound of stopping early on a schedule that is no worse than its rival."""
_LEAST = 8  # fewest sequences from which a standard error is reliable


def clearly_worse(partial: Quality, rival: Quality, checks: int, level: float = LEVEL) -> bool:
    """Whether a partly measured schedule has a larger KL than a rival that was measured on all sequences.

    This is a one-sided paired t-test. Let d be the difference of the mean KL per token over the n sequences measured
    for both (a ratio estimate with sequences as units) and s its standard error. The schedule is clearly worse if
    d − t(1 − level / checks, n − 1)·s > 0. By the Bonferroni correction over all checks, a schedule that is no worse is
    stopped with probability at most `level`, provided that the differences are nearly normal and the sequences seen
    are effectively a random sample of all sequences. With fewer than 8 sequences the answer is always False.

    Args:
        partial: quality on the sequences measured so far; the other sequences have a token count of 0.
        rival: quality on all sequences.
        checks: largest number of times that this test is applied in one measurement, at least 1.
        level: bound on the error probability, 0 < level < 1.

    Raises:
        ValueError: the rival was measured on other sequences or not in full.
    """
    used = [number for number, count in enumerate(partial.tokens_by_sequence) if count]
    counts = [quality.tokens_by_sequence for quality in (partial, rival)]
    if rival.state != "ok" or any(counts[0][number] != counts[1][number] for number in used):
        raise Refusal("a schedule can only race against a rival that was measured in full on the same workload")
    if len(used) < _LEAST:
        return False
    tokens = torch.tensor(counts[0], dtype=torch.float64)[used]
    sums = [torch.tensor(quality.kl_by_sequence, dtype=torch.float64)[used] for quality in (partial, rival)]
    difference = sums[0] - sums[1]
    bound = student_quantile(1 - level / checks, len(used) - 1) * ratio_standard_error(difference, tokens)
    return float(difference.sum() / tokens.sum()) > bound


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution by its expansion in 1 / freedom (Abramowitz & Stegun 26.7.5).

    The relative error is below 0.1 % for at least 7 degrees of freedom and 0.5 < probability ≤ 0.999.
    """
    z = NormalDist().inv_cdf(probability)
    terms: tuple[float, ...] = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(freedom) ** power for power, term in enumerate(terms, 1))
