"""Tensor files: safetensors that appear whole or not at all, and a full disk said as Python says it.

Knows files and what libraries written in Rust say when the system refuses them; not what the tensors mean.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

__all__ = ["new_tensor_file", "system_errors"]


@contextmanager
def new_tensor_file(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> Iterator[Path]:
    """A file of these tensors at `path`, to be moved to its place inside; what is still there afterwards is removed.

    Raises:
        OSError: the disk is full or not writable.
    """
    try:
        with system_errors(path.parent):
            named = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(named, path, metadata=metadata)
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def system_errors(place: Path) -> Iterator[None]:
    """An error of the system that a library tells in words only, as the OSError it was; `place` is where it writes."""
    try:
        yield
    except Exception as error:
        told = re.search(r"\(os error (\d+)\)", str(error))
        if told is None or isinstance(error, OSError):
            raise
        code = int(told[1])
        raise OSError(code, f"{os.strerror(code)}, as {place} was written") from error
