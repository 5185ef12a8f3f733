"""Choose the device and dtype for a model."""

from __future__ import annotations

import re

import torch

from compression.refusal import Refusal, nearest
from search.config import Dtype
from search.runtime.distributed import Processes

__all__ = ["resolve_device", "working_dtype"]

_DEVICES = ("auto", "cpu", "cuda")


def resolve_device(device: str = "auto") -> torch.device:
    """The device for "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:n".

    Without a number, processes that train together are distributed over the GPUs, one each if there are enough.

    Raises:
        ValueError: the word is unknown or the GPU does not exist; the message names the nearest valid choice.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device(f"cuda:{Processes.place() % count}" if count else "cpu")
    if device == "cpu":
        return torch.device("cpu")
    if not (match := re.fullmatch(r"cuda(?::(\d{1,3}))?", device)):
        raise Refusal(
            f"device must be auto, cpu, cuda or cuda:n, got {device!r}; the nearest is {nearest(device, _DEVICES)}"
        )
    own = Processes.place() % max(1, count)
    if (index := own if match[1] is None else int(match[1])) >= count:
        valid = f"cuda:{count - 1}" if count else "cpu"
        raise Refusal(f"device must exist, got {device!r} with {count} GPUs here; the nearest is {valid}")
    return torch.device(f"cuda:{index}")


def working_dtype(name: Dtype, device: torch.device) -> torch.dtype:
    """The dtype of this name; "auto" is bfloat16 if the hardware supports its arithmetic, otherwise float32."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
