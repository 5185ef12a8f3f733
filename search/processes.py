"""Processes: several of them train one model on shares of every batch, as `accelerate launch` starts them.

Knows torch.distributed and what the launcher leaves in the environment; nothing of models. Started any other way there
is one process, and everything here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import distributed

__all__ = ["Processes"]


class Processes:
    """This process among those that train together.

    Attributes:
        rank, count: this one's number from 0, and how many there are.
    """

    def __init__(self) -> None:
        self.rank, self.count = 0, 1
        if self.wanted() < 2:
            return
        if not distributed.is_initialized():
            distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        self.rank, self.count = distributed.get_rank(), distributed.get_world_size()

    @staticmethod
    def wanted() -> int:
        """How many processes the launcher has started; 1 without one."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    def sum_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.count > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def of_first(self, value: float) -> float:
        """What the first process has, so that all decide alike."""
        if self.count == 1:
            return value
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        held = torch.tensor(value, dtype=torch.float64, device=device)
        distributed.broadcast(held, 0)
        return float(held)
