"""Assembles sections of text, figures and tables into one self-contained HTML file. Knows no runs.

The page loads no scripts, fonts or images from elsewhere, and follows the light or dark mode of the reader's system.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from search.reporting.tables import Column, occurring
from search.runtime.outside_text import html_text

__all__ = ["Section", "page", "table"]


@dataclass(frozen=True)
class Section:
    """One section of a page.

    Attributes:
        title: heading, as plain text.
        text: a sentence or two below the heading, as plain text.
        figure: HTML made by `search.reporting.charts` or `table`.
        data: the values behind `figure`, as rows with the same keys; the page folds them away below the figure.
    """

    title: str
    text: str = ""
    figure: str = ""
    data: Sequence[Mapping[str, object]] = field(default=())


def table(rows: Sequence[Mapping[str, object]], columns: Sequence[Column]) -> str:
    """Return rows as an HTML table that scrolls sideways if it is too wide; columns that no row has are left out."""
    columns = occurring(rows, columns)
    head = "".join(f"<th{_kind(column)}>{html_text(column.title)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td{_kind(column)}>{html_text(column.show(row))}</td>" for column in columns) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def page(title: str, headline: str, sections: Sequence[Section]) -> str:
    """Return the text of the whole HTML file."""
    body = "".join(_section(section) for section in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html_text(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main><h1>{html_text(title)}</h1><p class='headline'>{html_text(headline)}</p>"
        f"{body}</main></body></html>\n"
    )


def _section(section: Section) -> str:
    text = f"<p>{html_text(section.text)}</p>" if section.text else ""
    data = ""
    if section.data:
        columns = [Column(key, key, ".6g" if _numeric(section.data, key) else "") for key in section.data[0]]
        data = f"<details><summary>data</summary>{table(section.data, columns)}</details>"
    return f"<section><h2>{html_text(section.title)}</h2>{text}{section.figure}{data}</section>\n"


def _numeric(rows: Sequence[Mapping[str, object]], key: str) -> bool:
    return all(isinstance(row.get(key), int | float | None) for row in rows)


def _kind(column: Column) -> str:
    return ' class="number"' if column.form else ""


_STYLE = """
:root{--page:#fff;--ink:#1c2128;--faint:#d5d9df;--soft:#5b6470;--accent:#1f6feb;
--series-0:#1f6feb;--series-1:#c2410c;--series-2:#15803d;--series-3:#9333ea;--series-4:#b45309;--series-5:#0e7490}
@media (prefers-color-scheme:dark){:root{--page:#0f1318;--ink:#e4e8ee;--faint:#323a45;--soft:#9aa4b2;--accent:#4c9aff;
--series-0:#4c9aff;--series-1:#fb923c;--series-2:#4ade80;--series-3:#c084fc;--series-4:#fbbf24;--series-5:#22d3ee}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
main{max-width:62rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0}
h2{font-size:1.15rem;margin:2rem 0 .5rem}
.headline{font-size:1.1rem}
svg{display:block;width:100%;max-width:36rem;height:auto}
svg text{fill:var(--soft);font:11px system-ui,sans-serif}
svg text.cell{fill:var(--ink);font-size:10px}
svg .grid{stroke:var(--faint);stroke-width:1;fill:none}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums;white-space:nowrap}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--faint);text-align:left}
th.number,td.number{text-align:right}
details{margin:.5rem 0}
summary{color:var(--soft);cursor:pointer}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.25rem 1rem;padding:0;margin:.25rem 0;font-size:.85rem}
.legend span{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.4em}
"""
