"""Draws charts as inline SVG that is readable on a phone, in light and dark mode. Knows no files and no runs.

Colours come from the page's CSS custom properties `--ink`, `--faint`, `--accent`, and `--series-0` to `--series-5`.
Every mark states its value in a `<title>`, which browsers show on hover and screen readers read out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from search.runtime.outside_text import html_text

__all__ = ["SERIES", "heat_map", "line_chart", "scatter_chart"]

SERIES = 6
"""Number of colours before they repeat."""

_WIDTH, _HEIGHT = 380, 240  # size of the drawing; a phone shows it about 1:1, so letters stay legible
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 10, 36
_CELL = 17  # height of a heat map's row

Points = Sequence[tuple[float, float]]


def line_chart(series: Mapping[str, Points], x_title: str, y_title: str) -> str:
    """Draw one line per series of (x, y) points, with a legend for several series; non-finite points break a line."""
    frame = _Frame([point for points in series.values() for point in points])
    marks = []
    for number, (name, points) in enumerate(series.items()):
        words, pen = [], "M"
        for x, y in points:
            if not (math.isfinite(x) and math.isfinite(y)):
                pen = "M"
                continue
            words.append(f"{pen}{frame.x(x):.1f} {frame.y(y):.1f}")
            pen = "L"
        last = next((f"{y:.4g} at {x:.4g}" for x, y in reversed(points) if math.isfinite(y)), "no figure")
        marks.append(
            f'<path d="{" ".join(words)}" fill="none" stroke="{_colour(number)}" stroke-width="1.8">'
            f"<title>{html_text(name)}: {last}</title></path>"
        )
    return frame.drawn("".join(marks), x_title, y_title) + _legend(list(series))


def scatter_chart(series: Mapping[str, Mapping[str, tuple[float, float]]], x_title: str, y_title: str) -> str:
    """Draw a dot for every named point of every series; non-finite points are left out."""
    frame = _Frame([point for points in series.values() for point in points.values()])
    marks = []
    for number, (kind, points) in enumerate(series.items()):
        for name, (x, y) in points.items():
            if math.isfinite(x) and math.isfinite(y):
                marks.append(
                    f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.2" fill="{_colour(number)}"'
                    f' fill-opacity=".75"><title>{html_text(f"{kind} {name}".strip())}: {x:.4g}, {y:.4g}</title>'
                    "</circle>"
                )
    return frame.drawn("".join(marks), x_title, y_title) + _legend(list(series))


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    strength: Mapping[tuple[str, str], float],
    label: Mapping[tuple[str, str], str],
) -> str:
    """Draw a labelled cell for every (row, column) that has a strength; stronger cells are darker.

    Args:
        strength: value in [0, 1] by (row, column); values outside are clipped. A cell without a value stays empty.
        label: text of a few letters by (row, column).
    """
    left, top = 34, 20
    wide = (_WIDTH - left) / max(1, len(columns))
    height = top + _CELL * len(rows) + 4
    marks = [
        f'<text x="{left + (number + 0.5) * wide:.1f}" y="13" text-anchor="middle">{html_text(name)}</text>'
        for number, name in enumerate(columns)
    ]
    for line, row in enumerate(rows):
        y = top + line * _CELL
        marks.append(f'<text x="{left - 6}" y="{y + 12}" text-anchor="end">{html_text(row)}</text>')
        for number, column in enumerate(columns):
            if (value := strength.get((row, column))) is None or not math.isfinite(value):
                continue
            x, value = left + number * wide, min(1.0, max(0.0, value))
            text = html_text(label.get((row, column), ""))
            marks.append(
                f'<rect x="{x + 0.5:.1f}" y="{y + 0.5}" width="{wide - 1:.1f}" height="{_CELL - 1}" rx="2"'
                f' fill="var(--accent)" fill-opacity="{0.04 + 0.8 * value:.2f}">'
                f"<title>{html_text(row)} {html_text(column)}: {text}</title></rect>"
                f'<text x="{x + wide / 2:.1f}" y="{y + 12.5}" text-anchor="middle" class="cell">{text}</text>'
            )
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img">{"".join(marks)}</svg>'


class _Frame:
    """Axes around a set of points, with ticks at round numbers."""

    def __init__(self, points: Points) -> None:
        finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] or [(0.0, 0.0)]
        self._x, self._y = (_ticks(min(values), max(values)) for values in zip(*finite, strict=True))

    def x(self, value: float) -> float:
        low, high = self._x[0], self._x[-1]
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self._y[0], self._y[-1]
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _BOTTOM - _TOP)

    def drawn(self, marks: str, x_title: str, y_title: str) -> str:
        lines = []
        for tick in self._y:
            y = self.y(tick)
            lines.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" class="grid"/>')
            lines.append(f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
        for number, tick in enumerate(self._x):
            anchor = "end" if number == len(self._x) - 1 else "middle"
            lines.append(
                f'<text x="{self.x(tick):.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="{anchor}">{tick:.4g}</text>'
            )
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        titles = (
            f'<text x="{middle}" y="{_HEIGHT - 5}" text-anchor="middle">{html_text(x_title)}</text>'
            f'<text transform="translate(11 {_HEIGHT / 2 - 10}) rotate(-90)" text-anchor="middle">'
            f"{html_text(y_title)}</text>"
        )
        return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(lines)}{titles}{marks}</svg>'


def _ticks(low: float, high: float) -> list[float]:
    """Return three to seven evenly spaced round numbers; the first is at most `low`, the last at least `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, last + 1)]


def _colour(number: int) -> str:
    return f"var(--series-{number % SERIES})"


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    entries = (
        f'<li><span style="background:{_colour(number)}"></span>{html_text(name)}</li>'
        for number, name in enumerate(names)
    )
    return f'<ul class="legend">{"".join(entries)}</ul>'
