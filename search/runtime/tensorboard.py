"""Curves for TensorBoard, where it is installed: `tensorboard --logdir RUN` shows a search or a healing as it goes.

Knows names, numbers and a folder. What is written here is for looking only; nothing reads it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["CURVES", "Curves", "curves"]

CURVES = "tensorboard"
"""Folder of them in the folder of a run."""


class Curves:
    """Draws points; without a writer it does nothing, and when the disk is full it ends without harm."""

    def __init__(self, writer: Any = None) -> None:
        self._writer = writer

    def draw(self, step: int, values: Mapping[str, float]) -> None:
        """One point of every named curve at a step; what is no number is left out."""
        for name, value in values.items():
            if self._writer is not None and math.isfinite(value):
                self._guarded(self._writer.add_scalar, name, value, step)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._guarded(self._writer.close)
            self._writer = None

    def _guarded(self, action: Callable[..., None], *arguments: object) -> None:
        try:
            action(*arguments)
        except OSError:
            self._writer = None


@contextmanager
def curves(folder: Path | None) -> Iterator[Curves]:
    """For the folder of a run; a continued run adds to what is there. None draws nothing."""
    drawn = Curves()
    if folder is not None:
        with suppress(ImportError, OSError):
            from torch.utils.tensorboard import SummaryWriter

            drawn = Curves(SummaryWriter(str(folder / CURVES), flush_secs=10))
    try:
        yield drawn
    finally:
        drawn.close()
