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

from compression.storage.temporary_names import temporary_folder

__all__ = ["new_tensor_file", "system_errors"]


@contextmanager
def new_tensor_file(
    target: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> Iterator[Path]:
    """Write tensors to a temporary file beside `target`, which the body of the context moves to its final place.

    A file that the body has not moved is removed when the context ends.

    Raises:
        OSError: the disk is full or not writable.
    """
    with temporary_folder(target.parent, target.name) as folder:
        path = folder / "unfinished"
        with system_errors(target.parent):
            named = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(named, path, metadata=metadata)
        path.chmod(0o644)
        yield path


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
