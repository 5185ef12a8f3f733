"""A layer of hand-made models that several tests build on."""

from __future__ import annotations

import torch
from torch import nn


class Conv1D(nn.Module):
    """Transposed weight, as in GPT-2."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.2)
        self.bias = nn.Parameter(torch.randn(outputs) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias
