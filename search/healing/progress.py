"""The progress of a healing and the measurements taken along the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from search.healing.plan import HealingPlan

__all__ = ["Measurement", "Progress"]


@dataclass(frozen=True)
class Measurement:
    """One measurement on text that healing does not learn from.

    Attributes:
        tokens: positions learned before the measurement.
        seconds: training time before the measurement.
        kl: KL(dense ‖ model), nats per token.
        perplexity: perplexity on the same text.
    """

    tokens: int
    seconds: float
    kl: float
    perplexity: float


@dataclass(eq=False)
class Progress:
    """The progress of a healing: the part of a checkpoint that is not tensors."""

    step: int = 0
    position: int = 0  # rows handed out
    tokens: int = 0
    seconds: float = 0.0
    measurements: list[Measurement] = field(default_factory=list)

    def fraction(self, plan: HealingPlan) -> float:
        """Completed share of the plan, by tokens or by time, whichever is larger; healing ends at 1."""
        done = [0.0]
        if plan.tokens:
            done.append(self.tokens / plan.tokens)
        if plan.minutes:
            done.append(self.seconds / (60 * plan.minutes))
        return max(done)

    def rate_factor(self, plan: HealingPlan) -> float:
        """Learning rate relative to its peak: it warms up over the first 5 % of the plan and falls linearly to 0."""
        done = self.fraction(plan)
        return min(1.0, (done + 0.005) / 0.05) * max(0.0, 1.0 - done)

    def to_state(self) -> dict[str, Any]:
        """Plain values for a checkpoint. The measurements are stored under "looks", their key since version 0.1."""
        values = asdict(self)
        values["looks"] = values.pop("measurements")
        return values

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """Inverse of `to_state`; other keys are ignored."""
        plain = {name: state[name] for name in ("step", "position", "tokens", "seconds")}
        return cls(**plain, measurements=[Measurement(**values) for values in state["looks"]])
