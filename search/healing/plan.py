"""How long and how a model is healed."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from compression.refusal import Refusal

__all__ = ["HealingPlan", "Options", "text_tokens"]


@dataclass(frozen=True)
class HealingPlan:
    """How to heal; what `resume` may not change but `minutes` and `tokens`.

    Attributes:
        minutes, tokens: healing ends with whichever is reached first, in minutes of training or in learned positions;
            at least one is given.
        loss: "distill" from the dense model's logits, or "labels", the text's own next tokens.
        rate: largest learning rate of the cores; norms and biases take `vector_rate`.
        batch_tokens: tokens of one step, of all processes together.
        pass_tokens: tokens of one forward pass, halved where memory runs out; steps add up the gradients of several.
        targets: how many of the dense model's likeliest tokens are told apart.
        sample: in distillation, how many tokens stand for all others, see `compression.training.distillation`; 0 takes
            them all. Labels take them all: one target a position leaves too much to the others.
        hidden_weight: weight of the squared distance of the last hidden states, relative to the dense model's; 0 leaves
            it out, and the targets of rows met before need no dense model.
        clip: largest norm of a gradient.
        checkpointing: keep no activations inside the blocks; slower, with less memory.
        gates: train a factor for every output of a tensorized layer too, see `compression.training.gates`.
        seed: of the order of rows and of samples.
    """

    minutes: float | None = None
    tokens: int | None = None
    loss: Literal["distill", "labels"] = "distill"
    rate: float = 4e-5
    vector_rate: float = 3e-4
    batch_tokens: int = 512
    pass_tokens: int = 2048
    targets: int = 64
    sample: int = 1024
    hidden_weight: float = 0.0
    clip: float = 1.0
    checkpointing: bool = False
    gates: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.minutes is None and self.tokens is None:
            raise Refusal("healing needs an end: minutes or tokens")
        for name in ("minutes", "tokens", "rate", "vector_rate", "batch_tokens", "pass_tokens", "targets", "clip"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise Refusal(f"{name} must be above 0, got {value}")

    @property
    def length(self) -> str:
        """How long it is to take, as part of a file's name."""
        return f"{self.minutes:g}min" if self.tokens is None else f"{self.tokens}tokens"

    def identity(self) -> dict[str, Any]:
        """What a resumed healing has to agree on."""
        return {name: value for name, value in asdict(self).items() if name not in ("minutes", "tokens", "pass_tokens")}


_TOKENS_A_SECOND = {"cpu": 500, "cuda": 100_000}
_ON_GPU = {"rate": 1e-4, "batch_tokens": 1 << 13, "pass_tokens": 1 << 14, "sample": 0}
"""Other defaults of `HealingPlan`: a GPU is idle in small steps, and takes no time for what a sample would save."""


@dataclass(frozen=True)
class Options:
    """What the command line says about a healing; None leaves the default of `HealingPlan`."""

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

    @property
    def data_name(self) -> str:
        """Of the source, as part of a folder's name."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(self.data).name)

    def plan(self, seed: int, device: torch.device) -> HealingPlan:
        """Raises ValueError, one line, for a value out of range."""
        names = {field.name for field in dataclasses.fields(HealingPlan)}
        given = {name: value for name, value in dataclasses.asdict(self).items() if name in names and value is not None}
        given = {**(_ON_GPU if device.type == "cuda" else {}), **given}
        if self.tokens is not None:
            given.pop("minutes", None)
        return HealingPlan(**given, seed=seed)


def text_tokens(plan: HealingPlan, device: torch.device, options: Options) -> int:
    """What is asked for, or more than the plan can get through: no row is met twice where there is enough text."""
    if options.text_tokens is not None:
        return options.text_tokens
    if plan.tokens is not None:
        return plan.tokens
    assert plan.minutes is not None
    return int(60 * plan.minutes * _TOKENS_A_SECOND["cpu" if device.type == "cpu" else "cuda"])
