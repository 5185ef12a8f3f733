"""Makes text that comes from outside, such as names in files and messages of libraries, harmless where it is shown.

A terminal obeys control characters, a spreadsheet computes cells that begin with "=", Markdown and HTML have markup,
and YAML has types. Every place that shows such text passes it through a function of this module. Knows text only.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from html import escape

__all__ = ["csv_cell", "csv_original", "front_matter", "html_text", "markdown_code", "markdown_text", "plain"]

_JOINERS = "\u200c\u200d"  # needed to write Persian, Hindi and emoji
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format such as right-to-left, surrogates, line and paragraph ends
_MARKUP = re.compile(r"([\\`*\[\]<>|&])")
_FORMULA = re.compile(r"[=+\-@'\t\r\n]")


def plain(text: object, lines: bool = False) -> str:
    r"""Returns text in which every character that a terminal would obey is written as an escape such as \u001b.

    The escapes are those of JSON, so a JSON text stays one. Printable text of any language is returned unchanged.

    Args:
        text: anything; `str` of it is taken.
        lines: keep line breaks and tabs, for text of several lines; otherwise the result is one line.
    """
    shown = str(text)
    if shown.isprintable():
        return shown
    kept = _JOINERS + "\n\t" * lines
    return "".join(
        json.dumps(one)[1:-1].replace("\x7f", "\\u007f")
        if unicodedata.category(one) in _UNSEEN and one not in kept
        else one
        for one in shown
    )


def html_text(text: object) -> str:
    """Returns text for the body or an attribute of an HTML or SVG file."""
    return escape(plain(text))


def markdown_text(text: object) -> str:
    """Returns text for a line or a table cell of a Markdown file, without markup, links or HTML of its own."""
    return _MARKUP.sub(r"\\\1", plain(text)).replace("\\<", "&lt;").replace("\\&", "&amp;")


def markdown_code(text: object) -> str:
    """Returns text as a code span of Markdown."""
    return f"`{plain(text).replace('`', chr(39))}`"


def front_matter(fields: Mapping[str, object]) -> str:
    """Returns the YAML block at the top of a model card, quoted as YAML needs it; fields that are None are left out."""
    import yaml  # type: ignore[import-untyped]

    given = {
        key: [plain(one) for one in value] if isinstance(value, list | tuple) else plain(value)
        for key, value in fields.items()
        if value is not None
    }
    return f"---\n{yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=10_000)}---\n"


def csv_cell(value: object) -> object:
    """Returns the value of a CSV cell; a text that a spreadsheet could take for a formula gets an apostrophe in front.

    Numbers and None stay as they are. `csv_original` takes the apostrophe away.
    """
    if not isinstance(value, str):
        return value
    return plain(f"'{value}" if _FORMULA.match(value) else value, lines=True)


def csv_original(value: object) -> object:
    """Returns what `csv_cell` was given, for a cell that was read back."""
    return value[1:] if isinstance(value, str) and value[:1] == "'" and _FORMULA.match(value[1:]) else value
