"""Heat maps of a sensitivity table, as SVG. Knows tables of figures; draws off screen."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["draw_heat_map"]


def draw_heat_map(
    table: NDArray[np.float64], rows: Sequence[object], columns: Sequence[object], title: str, across: str, figure: str
) -> str:
    """Rows are blocks. Colours are logarithmic; what is not positive or not there stays blank.

    Args:
        table: (rows, columns).
        across: what the columns are.
        figure: what the colours are, with its unit.
    """
    import matplotlib

    matplotlib.use("svg")
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
    axes.set_title(title, fontsize=10)
    drawn.colorbar(image, label=figure)
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "chisel", "svg.fonttype": "none"}):
        drawn.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
