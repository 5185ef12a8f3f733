"""Finds text that shares a run of words with what is reported, and leaves it out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from search.data.conversations import Document
from search.data.datasets import load_mmlu, load_proxy
from search.data.items import Item
from search.data.prose import load_prose, regions

__all__ = ["Shingles", "reported_texts", "without_overlap"]

_REPORTED = ("arc_easy", "hellaswag", "piqa", "sciq", "boolq")
_WORDS = 13
"""As in the overlap analysis of GPT-3 (Brown et al. 2020, appendix C)."""
_FEWEST = 6
"""A shorter text, such as "What is the capital of France?", says nothing about where it comes from."""


class Shingles:
    """Runs of thirteen words that occur in some texts, case, punctuation and spacing aside; whole texts if shorter.

    Of the texts every thirteenth run is kept, of what is compared with them all are looked up, so that 25 equal words
    in a row are always found.
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
        """Whether `text` has a run in common with them."""
        words = _words(text)
        return any(
            hash(tuple(words[start : start + size])) in known
            for size, known in self._known.items()
            for start in range(len(words) - size + 1)
        )


def reported_texts(items: Iterable[Item] = (), heldout: Sequence[str] = ()) -> Iterator[str]:
    """Everything that any table of this project reports on: held-out prose and the items of every report benchmark.

    Args:
        items, heldout: more of it, of a proxy or corpus of the user's.
    """
    for documents in load_prose():
        yield from regions(documents)[2]
    yield from heldout
    for item in [*(item for name in _REPORTED for item in load_proxy(name)), *load_mmlu("test"), *items]:
        yield f"{item.passage} {item.question}"


def without_overlap(
    documents: Iterable[Document], reported: Shingles, characters: int | None = None
) -> tuple[list[Document], int]:
    """The documents that share no run of words with what is reported, and how many before the last of them did.

    Args:
        characters: stop once there are so many; what comes later is not looked at.
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
