"""The settings of a healing: how long it lasts and how it trains."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from compression.refusal import Refusal
from search.data.conversations import check_source, sources

__all__ = ["HealingOptions", "HealingPlan", "text_tokens"]

_MOST = {
    "minutes": 100_000,
    "tokens": 10**12,
    "rate": 1_000,
    "vector_rate": 1_000,
    "scale_rate": 1_000,
    "batch_tokens": 10**9,
    "pass_tokens": 10**9,
}
_MOST_TARGETS = 10**6
_ROW = (16, 1 << 16)  # fewest and most tokens of a row


@dataclass(frozen=True)
class HealingPlan:
    """How to heal. A resumed healing may change only `minutes`, `tokens` and `pass_tokens`.

    Attributes:
        minutes, tokens: limits in minutes of training and in learned positions. Healing ends at whichever limit it
            reaches first; at least one must be given.
        loss: "distill" learns from the dense model's logits; "labels" learns the next tokens of the text itself.
        rate, vector_rate, scale_rate: peak learning rates of the cores, of norms and biases, and of the relative
            changes of the scales of quantized matrices; None takes that of `rates`.
        batch_tokens: tokens per optimizer step, over all processes together.
        pass_tokens: tokens per forward pass, halved whenever memory runs out. A step accumulates the gradients of as
            many passes as it needs.
        targets: distillation compares the probabilities of this many of the dense model's likeliest tokens one by one,
            and those of all others together; such targets are stored for later epochs. 0 compares those of all tokens.
        sample: with `targets` above 0, the number of randomly drawn tokens that represent the rest of the vocabulary,
            see `compression.training.distillation`; 0 uses the whole vocabulary. "labels" always uses the whole
            vocabulary, because with a single target per position nearly all tokens would be represented by the sample.
        hidden_weight: weight of the squared distance between the last hidden states of the two models, relative to the
            size of the dense model's. 0 drops this term; the dense model then need not run again on rows whose targets
            are stored.
        checkpointing: use activation checkpointing for the blocks: slower, with less memory.
        gates: also train one factor per output of a tensorized layer, see `compression.training.gates`.
        seed: seed of the order of the rows and of the sampled tokens.
    """

    minutes: float | None = None
    tokens: int | None = None
    loss: Literal["distill", "labels"] = "distill"
    rate: float | None = None
    vector_rate: float | None = None
    scale_rate: float | None = None
    batch_tokens: int = 512
    pass_tokens: int = 2048
    targets: int = 0
    sample: int = 0
    hidden_weight: float = 0.0
    checkpointing: bool = False
    gates: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.minutes is None and self.tokens is None:
            raise Refusal("healing needs an end: minutes or tokens")
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value is not None and not 0 < value <= most:
                raise Refusal(f"{name} must be above 0 and at most {most:,}, got {value}")
        for name in ("targets", "sample"):
            if not 0 <= getattr(self, name) <= _MOST_TARGETS:
                raise Refusal(f"{name} must be from 0 to {_MOST_TARGETS:,}, got {getattr(self, name)}")
        if not 0 <= self.hidden_weight <= _MOST["rate"]:
            raise Refusal(f"hidden_weight must be a number from 0 to {_MOST['rate']:,}, got {self.hidden_weight}")

    @property
    def length(self) -> str:
        """The planned length, formatted as part of a folder name."""
        return f"{self.minutes:g}min" if self.tokens is None else f"{self.tokens}tokens"

    def rates(self, kl: float) -> dict[str, float]:
        """The peak learning rates of "cores", "vectors" and "scales", given the KL before healing in nats per token.

        Every step also adds noise, whose damage does not depend on the KL, while the gain of a step falls with it. The
        rates of vectors and scales are therefore proportional to the KL up to 0.15 nats per token: a file of 100 MB of
        SmolLM2-135M went from 0.0118 to 0.0139 nats in four minutes at the full rates. For its cores 5e-5 to 7e-5 were
        best at 0.6 nats and 2e-5 to 4e-5 at 0.22, with 8e-5 doing harm there, in 25,000 and 16,000 tokens, judged on
        search text. The rate of the cores grows with the cube root of the batch.
        """
        falls = min(1.0, kl / 0.15)
        return {
            "cores": self.rate or 8e-5 * (self.batch_tokens / 512) ** (1 / 3) * min(1.0, kl / 0.8) ** 0.75,
            "vectors": self.vector_rate or 3e-4 * falls,
            "scales": self.scale_rate or 1e-3 * falls,
        }

    def identity(self) -> dict[str, Any]:
        """The settings that a resumed healing must share with the interrupted one."""
        return {name: value for name, value in asdict(self).items() if name not in ("minutes", "tokens", "pass_tokens")}


_TOKENS_A_SECOND = {"cpu": 500, "cuda": 100_000}
_ON_GPU = {"batch_tokens": 1 << 13, "pass_tokens": 1 << 14}
"""Defaults of `HealingPlan` on a GPU, which small steps would leave idle."""


@dataclass(frozen=True)
class HealingOptions:
    """The healing options of the command line; None selects the default of `HealingPlan`."""

    minutes: float | None = 30.0
    tokens: int | None = None
    data: str = "text"
    text_tokens: int | None = None
    loss: Literal["distill", "labels"] = "distill"
    hidden_weight: float = 0.0
    rate: float | None = None
    batch_tokens: int | None = None
    pass_tokens: int | None = None
    row_tokens: int = 256
    checkpointing: bool = False
    gates: bool = False
    out: str | None = None
    trust_remote_code: bool = False

    @property
    def data_name(self) -> str:
        """The name of the text source, reduced to characters that are safe in a folder name."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(self.data).name)

    def plan(self, seed: int, device: torch.device) -> HealingPlan:
        """The healing plan for these options on `device`.

        Raises:
            ValueError: a value is out of range, or a source of text does not exist.
        """
        least, most = _ROW
        if not least <= self.row_tokens <= most:
            raise Refusal(f"row_tokens must be a whole number from {least} to {most}, got {self.row_tokens}")
        if self.text_tokens is not None and not self.row_tokens <= self.text_tokens <= _MOST["tokens"]:
            raise Refusal(
                f"text_tokens must be at least the {self.row_tokens} of a row and at most {_MOST['tokens']:,}, got "
                f"{self.text_tokens}"
            )
        for name in sources(self.data):
            check_source(name)
        names = {field.name for field in dataclasses.fields(HealingPlan)}
        given = {name: value for name, value in dataclasses.asdict(self).items() if name in names and value is not None}
        given = {**(_ON_GPU if device.type == "cuda" else {}), **given}
        if self.tokens is not None:
            given.pop("minutes", None)
        return HealingPlan(**given, seed=seed)


def text_tokens(plan: HealingPlan, device: torch.device, options: HealingOptions) -> int:
    """How many tokens of healing text to prepare.

    Without an explicit number, this is about as many as the plan can learn from, so that no row repeats while the
    source has enough text. It is at least one row.
    """
    if options.text_tokens is not None:
        return options.text_tokens
    if plan.tokens is not None:
        return max(options.row_tokens, plan.tokens)
    assert plan.minutes is not None
    wanted = int(60 * plan.minutes * _TOKENS_A_SECOND["cpu" if device.type == "cpu" else "cuda"])
    return max(options.row_tokens, wanted)
