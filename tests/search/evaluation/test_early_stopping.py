"""Racing against known truth: the error rate on noise, the power on a difference, the quantiles of Student's t."""

from __future__ import annotations

import numpy as np
import pytest

from search.evaluation.early_stopping import clearly_worse, student_quantile
from search.evaluation.quality import Quality


def quality(kl: np.ndarray, tokens: np.ndarray, seen: int | None = None, state: str = "ok") -> Quality:
    """Figures of the first `seen` sequences, or of all."""
    counts = np.where(np.arange(len(tokens)) < (len(tokens) if seen is None else seen), tokens, 0)
    return Quality(
        state=state, kl_by_sequence=tuple((kl * counts).tolist()), tokens_by_sequence=tuple(map(int, counts))
    )


def share_stopped(shift: float, trials: int = 1500, level: float = 0.05) -> float:
    """Of races over 40 sequences, looked at after 10, 20 and 30: the share stopped. Differences have spread 1."""
    generator = np.random.default_rng(0)
    stopped = 0
    for _ in range(trials):
        tokens = generator.integers(40, 256, 40)
        base = generator.gamma(4.0, 1.0, 40)
        rival = quality(base, tokens)
        candidate = base + shift + generator.normal(0.0, 1.0, 40)
        stopped += any(clearly_worse(quality(candidate, tokens, seen), rival, 3, level) for seen in (10, 20, 30))
    return stopped / trials


@pytest.mark.parametrize("level", [0.05, 0.2])
def test_a_schedule_that_is_no_worse_is_stopped_about_as_seldom_as_stated(level: float) -> None:
    # Bonferroni over correlated looks is careful, the t of a weighted mean a little bold; 1,500 trials know it to 0.01
    assert 0.4 * level < share_stopped(0.0, level=level) < 1.25 * level


@pytest.mark.slow
def test_a_better_schedule_is_hardly_ever_stopped_and_a_worse_one_mostly() -> None:
    assert share_stopped(-0.3) < 0.01
    assert share_stopped(1.0) > 0.9


def test_nothing_is_decided_on_few_sequences() -> None:
    tokens, base = np.full(40, 100), np.ones(40)
    assert not clearly_worse(quality(base + 5, tokens, 7), quality(base, tokens), 3)
    assert clearly_worse(quality(base + 5 + np.arange(40) / 100, tokens, 8), quality(base, tokens), 3)


def test_a_rival_without_numbers_or_from_another_workload_is_refused() -> None:
    tokens, base = np.full(12, 100), np.ones(12)
    for rival in (quality(base, tokens + 1), quality(base, tokens, state="raced"), Quality()):
        with pytest.raises(ValueError, match="measured in full"):
            clearly_worse(quality(base, tokens, 9), rival, 1)


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    # from tables of Student's t
    [(0.95, 7, 1.8946), (0.975, 10, 2.2281), (0.99, 20, 2.5280), (0.995, 7, 3.4995), (0.999, 30, 3.3852)],
)
def test_quantiles_are_those_of_the_tables(probability: float, freedom: int, expected: float) -> None:
    assert student_quantile(probability, freedom) == pytest.approx(expected, rel=1e-3)
