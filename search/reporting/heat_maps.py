"""Draws heat maps of a sensitivity table as SVG with matplotlib, without a display. Knows tables of numbers only."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from search.runtime.outside_text import plain

__all__ = ["draw_heat_map"]


def draw_heat_map(
    table: NDArray[np.float64], rows: Sequence[object], columns: Sequence[object], title: str, across: str, figure: str
) -> str:
    """Return a heat map of blocks (rows) on a logarithmic colour scale; values that are not positive stay blank.

    Args:
        table: shape (rows, columns); NaN where there is no value.
        rows: block indices.
        columns: labels of the columns.
        title: heading of the drawing.
        across: label of the horizontal axis.
        figure: label of the colour bar, with the unit.
    """
    import matplotlib
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    shown = np.ma.masked_invalid(np.where(table > 0, table, np.nan))
    size = (2.5 + 0.5 * len(columns), 1.5 + 0.2 * len(rows))
    drawn = Figure(figsize=size, layout="constrained")
    axes = drawn.subplots()
    least, most = (float(shown.min()), float(shown.max())) if shown.count() else (1.0, 1.0)
    image = axes.imshow(shown, aspect="auto", cmap="viridis", norm=LogNorm(least, max(most, least * (1 + 1e-9))))
    axes.set_xticks(range(len(columns)), [str(column) for column in columns])
    every = 2 if len(rows) > 12 else 1
    axes.set_yticks(range(0, len(rows), every), [str(row) for row in rows[::every]])
    axes.set_xlabel(across)
    axes.set_ylabel("block")
    axes.set_title(plain(title), fontsize=10, parse_math=False)
    drawn.colorbar(image, label=figure)
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "chisel", "svg.fonttype": "none"}):
        drawn.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
