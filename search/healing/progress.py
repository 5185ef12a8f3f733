"""Where a healing is, and what it measured on the way."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Look"]


@dataclass(frozen=True)
class Look:
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
class _Progress:
    """Where a healing is; what a checkpoint holds beside tensors."""

    step: int = 0
    position: int = 0  # rows handed out
    tokens: int = 0
    seconds: float = 0.0
    looks: list[Look] = field(default_factory=list)
