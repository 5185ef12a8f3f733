"""Removes training texts that share a run of words with the texts and items that are reported on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from search.data.conversations import Document
from search.data.datasets import load_mmlu, load_proxy
from search.data.items import Item
from search.data.passages import PAPERS, passages, unseen_passages
from search.data.prose import load_prose, regions

__all__ = ["Shingles", "reported_texts", "without_overlap"]

_REPORTED = ("arc_easy", "hellaswag", "piqa", "sciq", "boolq")
_WORDS = 13
"""Length of a run in words, as in the overlap analysis of GPT-3 (Brown et al. 2020, appendix C)."""
_FEWEST = 6
"""Shorter texts, such as "Who wrote Hamlet?", are ignored, because an equal text can come from anywhere."""


class Shingles:
    """An index of runs of 13 words in a set of texts, ignoring case, punctuation and spacing.

    A text of fewer than 13 words is indexed whole. Of longer texts only runs that start at every 13th word are
    indexed, while every run of a compared text is looked up; 25 equal words in a row are therefore always found.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._known: dict[int, set[int]] = {}
        for text in texts:
            words = _words(text)
            if len(words) >= _FEWEST:
                size = min(len(words), _WORDS)
                for start in range(0, len(words) - size + 1, size):
                    self._known.setdefault(size, set()).add(hash(tuple(words[start : start + size])))

    def meet(self, text: str) -> bool:
        """Return whether `text` has a run in common with the indexed texts."""
        words = _words(text)
        return any(
            hash(tuple(words[start : start + size])) in known
            for size, known in self._known.items()
            for start in range(len(words) - size + 1)
        )


def reported_texts(items: Iterable[Item] = (), heldout: Sequence[str] = ()) -> Iterator[str]:
    """Yield every text that this project reports on: held-out and unseen prose, and the items of reported benchmarks.

    Args:
        items: further items, from a proxy of the user.
        heldout: further held-out texts, from a corpus of the user.
    """
    for documents in load_prose():
        yield from regions(documents)[2]
    yield from unseen_passages()
    yield from passages(PAPERS)
    yield from heldout
    for item in [*(item for name in _REPORTED for item in load_proxy(name)), *load_mmlu("test"), *items]:
        yield f"{item.passage} {item.question}"


def without_overlap(
    documents: Iterable[Document], reported: Shingles, characters: int | None = None
) -> tuple[list[Document], int]:
    """Return the documents that share no run of words with reported texts, and the number of documents removed.

    Args:
        characters: stop after this many characters are kept, and ignore the remaining documents; None reads them all.
    """
    kept: list[Document] = []
    left_out = seen = 0
    for document in documents:
        if characters is not None and seen >= characters:
            break
        if reported.meet(document.text):
            left_out += 1
        else:
            kept.append(document)
            seen += len(document.text)
    return kept, left_out


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
