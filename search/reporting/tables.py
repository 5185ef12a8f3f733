"""Formats results: rows of plain values as aligned text or Markdown, nested values as lines or JSON.

Knows how values are formatted; does not know where they come from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from search.runtime.files import finite
from search.runtime.outside_text import markdown_text, plain

__all__ = [
    "SUMMARY_COLUMNS",
    "Column",
    "Row",
    "json_text",
    "lines_text",
    "markdown_table",
    "occurring",
    "text_table",
]

Row = Mapping[str, object]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: key of the value in a row.
        title: heading, with the unit.
        form: format specification for numbers, such as ".3f"; empty shows the value as text.
        error: key of the standard error in a row, shown after "±" in the same format; empty if there is none.
    """

    key: str
    title: str
    form: str = ""
    error: str = ""

    def show(self, row: Row) -> str:
        """Return the text of the cell in a row: "-" if the value is absent, None or not finite."""
        shown = _number(row.get(self.key), self.form)
        error = row.get(self.error) if self.error else None
        return shown if error is None or shown == "-" else f"{shown} ± {_number(error, self.form)}"


SUMMARY_COLUMNS: tuple[Column, ...] = (
    Column("schedule", "schedule"),
    Column("kept_fraction", "kept", ".3f"),
    Column("kl", "KL nats/token", ".4f"),
    Column("kl_unseen", "KL unseen", ".4f"),
    Column("perplexity_prose", "ppl prose", ".2f"),
    Column("perplexity_exam", "ppl exam", ".2f"),
    Column("accuracy", "accuracy", ".3f", "accuracy_stderr"),
    Column("expected_accuracy", "P(correct)", ".4f", "expected_accuracy_stderr"),
    Column("items", "items", ",d"),
    Column("parameters", "parameters", ",d"),
    Column("bytes", "bytes", ",d"),
    Column("prefill_ratio", "prefill", ".2f"),
    Column("decode_ratio", "decode", ".2f"),
)
"""Columns of the final table of a run. Perplexity is measured separately on held-out prose and on held-out questions
with their answers, KL on both and on the report items, the KL on unseen text by itself, accuracy and P(correct) on the
report items. Prefill and decode are times relative to the dense model."""


def occurring(rows: Sequence[Row], columns: Sequence[Column]) -> list[Column]:
    """Return the columns that occur in at least one row; all columns if there are no rows."""
    return [column for column in columns if not rows or any(column.key in row for row in rows)]


def text_table(rows: Sequence[Row], columns: Sequence[Column] = SUMMARY_COLUMNS) -> str:
    """Return rows as aligned text under a heading, numbers to the right and words to the left; ends with a line break.

    Columns that no row has are left out.
    """
    columns = occurring(rows, columns)
    cells = [[plain(column.title) for column in columns], *([column.show(row) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "".join(
        "  ".join(
            cell.rjust(width) if column.form else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        + "\n"
        for line in cells
    )


def markdown_table(rows: Sequence[Row], columns: Sequence[Column] = SUMMARY_COLUMNS) -> str:
    """Return the cells of `text_table` as a Markdown table; ends with a line break."""
    columns = occurring(rows, columns)
    lines = [
        [markdown_text(column.title) for column in columns],
        ["---:" if column.form else "---" for column in columns],
        *([markdown_text(column.show(row)) for column in columns] for row in rows),
    ]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _number(value: object, form: str) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    return format(value, form) if form and isinstance(value, int | float) else plain(value)


def json_text(value: Mapping[str, object]) -> str:
    """Return indented JSON in ASCII, which every encoding can write, with null for numbers that are not finite."""
    return json.dumps(finite(value), indent=2)


def lines_text(value: Row, indent: str = "") -> str:
    """Return a nested mapping as aligned "key  value" lines."""
    width = max(map(len, value), default=0)
    lines = []
    for key, one in value.items():
        if isinstance(one, Mapping) and one:
            lines += [f"{indent}{key}", lines_text(one, indent + "  ")]
        else:
            text = plain(", ".join(map(str, one)) if isinstance(one, list | tuple | Mapping) else one)
            lines.append(f"{indent}{key:<{width}}  {text or 'none'}")
    return "\n".join(lines)
