"""Where a healing is, and what it measured on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from search.healing.plan import HealingPlan

__all__ = ["Measurement", "Progress"]


@dataclass(frozen=True)
class Measurement:
    """One measurement on text that is not learned from.

    Attributes:
        tokens: learned before it.
        seconds: of training before it.
        kl: nats per token to the dense model.
        perplexity: on the same text.
    """

    tokens: int
    seconds: float
    kl: float
    perplexity: float


@dataclass(eq=False)
class Progress:
    """Where a healing is; what a checkpoint holds beside tensors."""

    step: int = 0
    position: int = 0  # rows handed out
    tokens: int = 0
    seconds: float = 0.0
    measurements: list[Measurement] = field(default_factory=list)

    def fraction(self, plan: HealingPlan) -> float:
        """Share of the plan that is done, by tokens or by time, whichever is further; 1 ends the healing."""
        done = [0.0]
        if plan.tokens:
            done.append(self.tokens / plan.tokens)
        if plan.minutes:
            done.append(self.seconds / (60 * plan.minutes))
        return max(done)

    def rate_factor(self, plan: HealingPlan) -> float:
        """Learning rate over its largest: a rise over the first twentieth of the plan, then a linear fall to zero."""
        done = self.fraction(plan)
        return min(1.0, (done + 0.005) / 0.05) * max(0.0, 1.0 - done)

    def to_state(self) -> dict[str, Any]:
        """Plain values for a checkpoint. Measurements stand under "looks", their key since version 0.1."""
        values = asdict(self)
        values["looks"] = values.pop("measurements")
        return values

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """The reverse of `to_state`; other keys are ignored."""
        plain = {name: state[name] for name in ("step", "position", "tokens", "seconds")}
        return cls(**plain, measurements=[Measurement(**values) for values in state["looks"]])
