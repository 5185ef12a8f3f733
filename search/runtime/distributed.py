"""Processes: several of them train one model on shares of every batch, as `accelerate launch` starts them.

Knows torch.distributed and what the launcher leaves in the environment; nothing of models. Started any other way there
is one process, and everything here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

__all__ = ["Processes"]

_PATIENCE = timedelta(hours=3)  # for what the first process does alone, such as a repair


class Processes:
    """This process among those that train together.

    Attributes:
        rank, count: this one's number from 0, and how many there are.
        sharded: whether the launcher asked for models to be sharded (`accelerate launch --use_fsdp`).
    """

    def __init__(self) -> None:
        self.rank, self.count, self.sharded = 0, 1, False
        if self.wanted() < 2:
            return
        if not distributed.is_initialized():
            cuda = torch.cuda.is_available()
            if cuda:
                torch.cuda.set_device(self.place() % torch.cuda.device_count())
            distributed.init_process_group("nccl" if cuda else "gloo", timeout=_PATIENCE)
        self.rank, self.count = distributed.get_rank(), distributed.get_world_size()
        self.sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")

    @staticmethod
    def wanted() -> int:
        """How many processes the launcher has started; 1 without one."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @staticmethod
    def place() -> int:
        """This one's number on its machine, from 0."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    @staticmethod
    def is_first() -> bool:
        """Whether this is the one that talks and writes; known before any of them has met."""
        return Processes.wanted() < 2 or os.environ.get("RANK", "0") == "0"

    @staticmethod
    def end() -> None:
        """Part from the others, if they have met."""
        if distributed.is_initialized():
            distributed.destroy_process_group()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process runs this while the others wait, then they do."""
        if self.count > 1 and self.rank:
            distributed.barrier()
        yield
        if self.count > 1 and not self.rank:
            distributed.barrier()

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
