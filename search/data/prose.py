"""Reads the prose of the data packages and divides it into regions for calibration, search and held-out text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

from compression.refusal import Refusal
from search.data.packages import open_member, read_requirements

__all__ = ["Encode", "load_prose", "long_text", "regions", "text_digest"]

Encode = Callable[[str], list[int]]
_PACKAGE = "exllamav2"
_FOLDER = "exllamav2/conversion/standard_cal_data"
_SHARES = (0.7, 0.1, 0.2)
_SHORTEST = 80
"""Fewest characters of a line of prose; shorter lines are headings and lists."""
_ASCII = 0.95
"""Least share of ASCII characters in a line of prose; other lines are foreign languages or formulas."""


def long_text(encode: Encode, tokens: int, beginning: Sequence[int] = ()) -> tuple[int, ...]:
    """Return the first `tokens` tokens of the search text of the largest prose source, its documents concatenated.

    Args:
        encode: text to token ids, without special tokens.
        tokens: number of tokens, `beginning` included.
        beginning: special tokens that start the text.

    Raises:
        ValueError: the search text has fewer tokens.
        DataUnavailable: the data packages cannot be obtained.
    """
    found = list(beginning)
    for document in regions(load_prose()[-1])[1]:
        found += encode(document + "\n\n")
        if len(found) >= tokens:
            return tuple(found[:tokens])
    raise Refusal(f"context must be at most {len(found)}, the number of tokens of search text, got {tokens}")


def regions(documents: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Divide documents, in order, into calibration (70 % of the characters), search (10 %) and held-out (20 %)."""
    total = sum(map(len, documents))
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    seen = 0
    for document in documents:
        middle = (seen + len(document) / 2) / total
        parts[0 if middle < _SHARES[0] else 1 if middle < _SHARES[0] + _SHARES[1] else 2].append(document)
        seen += len(document)
    return tuple(parts[0]), tuple(parts[1]), tuple(parts[2])


def load_prose() -> tuple[tuple[str, ...], ...]:
    """Return the documents of the three prose sources, the smallest source first, without repeated paragraphs.

    Raises:
        DataUnavailable: the data packages cannot be obtained.
    """
    package = next(package for package in read_requirements() if package.name == _PACKAGE)
    seen: set[str] = set()
    sources = []
    for name, separator in (("technical", None), ("c4", r"\n"), ("wiki", r"</?doc\b[^>]*>")):
        text = open_member(package, f"{_FOLDER}/{name}.utf8").decode("utf-8", errors="replace")
        documents = (_document(part, seen) for part in (re.split(separator, text) if separator else [text]))
        sources.append(tuple(document for document in documents if document))
    return tuple(sources)


def _document(text: str, seen: set[str]) -> str:
    """Return the paragraphs of a document that are English prose and not yet `seen`, and add them to `seen`."""
    kept = []
    for line in text.split("\n"):
        prose = len(line) >= _SHORTEST and len(line.encode("ascii", "ignore")) >= _ASCII * len(line)
        if prose and (digest := text_digest(line)) not in seen:
            seen.add(digest)
            kept.append(line.strip())
    return "\n".join(kept)


def text_digest(text: str) -> str:
    """Return the sha256 of a text in hex, ignoring case and spacing."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()
