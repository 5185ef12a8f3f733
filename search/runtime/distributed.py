"""Coordinates several processes that train one model, each on its share of every batch (`accelerate launch`).

Knows torch.distributed and the environment variables that the launcher sets; knows no models. Without the launcher
there is one process, and everything here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

__all__ = ["Processes"]

_PATIENCE = timedelta(hours=3)  # how long the others wait for work of the first process alone, such as a repair


class Processes:
    """The group of processes that train together, as seen from this process.

    Attributes:
        rank: index of this process, from 0.
        count: number of processes.
        sharded: whether the launcher asked for sharded models (`accelerate launch --use_fsdp`).
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
        """Return how many processes the launcher has started; 1 without a launcher."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @staticmethod
    def place() -> int:
        """Return the index of this process on its machine, from 0."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    @staticmethod
    def is_first() -> bool:
        """Return whether this process is the one that prints and writes files; works before the group is set up."""
        return Processes.wanted() < 2 or os.environ.get("RANK", "0") == "0"

    @staticmethod
    def end() -> None:
        """Leave the process group, if there is one."""
        if distributed.is_initialized():
            distributed.destroy_process_group()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first process run the block while the others wait; then the others run it."""
        if self.count > 1 and self.rank:
            distributed.barrier()
        yield
        if self.count > 1 and not self.rank:
            distributed.barrier()

    def sum_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor, in place, by its sum over all processes."""
        if self.count > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def of_first(self, value: float) -> float:
        """Return the value that the first process passes, so that all processes decide alike."""
        if self.count == 1:
            return value
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        held = torch.tensor(value, dtype=torch.float64, device=device)
        distributed.broadcast(held, 0)
        return float(held)
