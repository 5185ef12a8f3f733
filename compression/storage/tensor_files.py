"""Writes safetensors files atomically, and raises system errors such as a full disk as Python's OSError.

Knows files and the error messages of libraries written in Rust; does not know what the tensors mean.
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
    """Write tensors to a temporary file `path`, which the body of the context moves to its final place.

    A file still at `path` when the context ends is removed.

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
    """Turn an exception that names a system error only in its text into an OSError.

    Args:
        place: the folder that is written to, for the message.
    """
    try:
        yield
    except Exception as error:
        told = re.search(r"\(os error (\d+)\)", str(error))
        if told is None or isinstance(error, OSError):
            raise
        code = int(told[1])
        raise OSError(code, f"{os.strerror(code)} while {place} was written") from error
