"""Writes curves for TensorBoard, if it is installed; `tensorboard --logdir RUN` then shows a search or healing live.

Knows names, numbers and a folder. The curves are for viewing only; no other part of Chisel reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["CURVES", "Curves", "curves"]

CURVES = "tensorboard"
"""Name of the subfolder of a run folder that holds the curves."""


class Curves:
    """Draws points. Does nothing without a writer, and stops drawing without an error when the disk is full."""

    def __init__(self, writer: Any = None) -> None:
        self._writer = writer

    def draw(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point at `step` to every named curve; values that are not finite are left out."""
        for name, value in values.items():
            if self._writer is not None and math.isfinite(value):
                self._guarded(self._writer.add_scalar, name, value, step)

    def close(self) -> None:
        """Write buffered points and close the writer."""
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
    """Yield curves for the folder of a run; a continued run appends to existing curves. None draws nothing."""
    drawn = Curves()
    if folder is not None:
        with suppress(ImportError, OSError):
            from torch.utils.tensorboard import SummaryWriter

            drawn = Curves(SummaryWriter(str(folder / CURVES), flush_secs=10))
    try:
        yield drawn
    finally:
        drawn.close()
