"""Computes the reward of a score. Knows scores only; does not know models, schedules or agents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from compression.refusal import Refusal

__all__ = ["Reward", "ScoreLike"]


class ScoreLike(Protocol):
    """Describes the attributes of a score that a reward reads."""

    @property
    def kl(self) -> float:
        """Mean token KL(dense‖compressed), nats."""

    @property
    def expected_accuracy(self) -> float:
        """Mean P(correct) over the proxy items, 0 to 1."""

    @property
    def kept_fraction(self) -> float:
        """Parameters after / before over the tensorizable sites."""

    @property
    def bytes_fraction(self) -> float:
        """Bytes after / before over the whole model."""

    @property
    def time_fraction(self) -> float:
        """Time of the tensorizable sites after / before; NaN if it was not requested."""

    @property
    def state(self) -> str:
        """Either "ok" or the reason why there is no score."""


@dataclass(frozen=True)
class Reward:
    """Computes the reward as a weighted sum:

    | weight | term | default |
    |---|---|---|
    | kl_weight | −KL, nats per token | 1 |
    | correct_weight | expected accuracy − expected accuracy of the dense model, −1 to 1 | 0.1 |
    | compression_weight | 1 − kept fraction | 1 |
    | bytes_weight | 1 − bytes fraction | 0 |
    | latency_weight | 1 − time fraction | 0 |

    The reward is never below `floor`, which is also the reward of a score whose state is not "ok" or whose sum is not
    finite. A term with weight 0 is not read. The projection makes every schedule meet the target, so the compression
    term is nearly constant within one search; it makes rewards at different targets comparable. Bytes and time do vary
    within a search, because schedules with the same kept fraction differ in both. All terms are continuous measures:
    the fraction of correct answers over a few hundred items would be too noisy.
    """

    kl_weight: float = 1.0
    correct_weight: float = 0.1
    compression_weight: float = 1.0
    bytes_weight: float = 0.0
    latency_weight: float = 0.0
    dense_expected_accuracy: float = 0.0
    floor: float = -30.0

    def __post_init__(self) -> None:
        for name in ("kl_weight", "correct_weight", "compression_weight", "bytes_weight", "latency_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise Refusal(f"{name} must be finite and at least 0, got {getattr(self, name)}")
        if not math.isfinite(self.floor):
            raise Refusal(f"floor must be finite, got {self.floor}")

    def __call__(self, score: ScoreLike) -> float:
        """Returns the reward of `score`, finite and at least `floor`."""
        if score.state != "ok":
            return self.floor
        terms = (
            (self.kl_weight, -score.kl),
            (self.correct_weight, score.expected_accuracy - self.dense_expected_accuracy),
            (self.compression_weight, 1.0 - score.kept_fraction),
            (self.bytes_weight, 1.0 - score.bytes_fraction),
            (self.latency_weight, 1.0 - score.time_fraction),
        )
        reward = sum(weight * term for weight, term in terms if weight)
        return max(self.floor, reward) if math.isfinite(reward) else self.floor
