"""Tells how much memory this machine has left, and whether an error says that there was too little."""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ["available_memory", "is_out_of_memory"]


def available_memory() -> int | None:
    """Bytes that a process can take without swapping; None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether GPU or main memory ran out; torch reports the latter as a RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
