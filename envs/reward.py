"""Reward: one number from a score. Pure arithmetic; knows nothing of models, schedules or agents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from compression.refusal import Refusal

__all__ = ["Reward", "ScoreLike"]


class ScoreLike(Protocol):
    """The part of an evaluator's score a reward reads."""

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
        """Time of the tensorizable sites after / before; NaN where nobody asked for it."""

    @property
    def state(self) -> str:
        """ "ok", or why there is no number."""


@dataclass(frozen=True)
class Reward:
    """What a score is worth: a weighted sum of

    | weight | of | default |
    |---|---|---|
    | kl_weight | −KL, nats per token | 1 |
    | correct_weight | expected accuracy − the dense model's, −1 to 1 | 0.1 |
    | compression_weight | 1 − kept fraction | 1 |
    | bytes_weight | 1 − bytes fraction | 0 |
    | latency_weight | 1 − time fraction | 0 |

    Never below `floor`, which is also the reward of a score whose state is not "ok" or whose reward is not finite. A
    term of weight 0 is not looked at. Since the target is met by projection the compression term is all but constant
    within one search; it makes rewards of different targets comparable. Bytes and time are not: schedules of one kept
    fraction differ in both. Continuous measures only: hard accuracy on some hundred items is noise.
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
        """The reward of `score`, finite, at least `floor`."""
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
