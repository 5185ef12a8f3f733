"""The figures of the documents: each is drawn from what is published, and each that a document shows is there."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.figures import FIGURES, drawn

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn_and_committed(name: str) -> None:
    for text in (drawn(name), (ROOT / "docs" / "figures" / f"{name}.svg").read_text(encoding="utf-8")):
        assert ElementTree.fromstring(text.encode()).tag.endswith("svg")


def test_every_picture_of_a_document_is_there() -> None:
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    shown = [(page, link) for page in documents for link in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text())]
    assert len(shown) >= len(FIGURES)
    assert [(page.name, link) for page, link in shown if not (page.parent / link).is_file()] == []
