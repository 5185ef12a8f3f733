"""Defines multiple-choice items and draws samples of them that are stratified by subject.

Knows the content of items; does not know tokens, models, or which item is used for what.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

from compression.refusal import Refusal

__all__ = ["Item", "Sampled", "stratified"]


@dataclass(frozen=True)
class Item:
    """One multiple-choice question.

    Attributes:
        question: the question, or the beginning of a text that the choices continue.
        choices: 2 to 26 answers.
        answer: index of the correct choice, from 0.
        subject: subject of the question; "" if unknown.
        passage: text that the question refers to; "" if none.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""
    passage: str = ""

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise Refusal("question must not be empty")
        if not 2 <= len(self.choices) <= 26 or not all(choice.strip() for choice in self.choices):
            raise Refusal(f"choices must be 2 to 26 non-empty texts, got {list(self.choices)!r:.80}")
        if not 0 <= self.answer < len(self.choices):
            raise Refusal(f"answer must be an index from 0 to {len(self.choices) - 1}, got {self.answer}")

    @cached_property
    def digest(self) -> str:
        """Identity for keeping splits apart: sha256 in hex over passage and question, ignoring case and spacing.

        The choices do not enter, because the same question with other choices leaks just as much.
        """
        return hashlib.sha256(" ".join(f"{self.passage} {self.question}".lower().split()).encode()).hexdigest()


class Sampled(Protocol):
    """Anything that `stratified` can sample by subject."""

    @property
    def digest(self) -> str:
        """Identity of the content."""

    @property
    def choices(self) -> tuple[str, ...]:
        """Choices, which distinguish two items with the same digest."""

    @property
    def subject(self) -> str:
        """Subject, by which the sample is stratified."""


_Sampled = TypeVar("_Sampled", bound=Sampled)


def stratified(items: Sequence[_Sampled], count: int, seed: int) -> tuple[_Sampled, ...]:
    """Return at most `count` items, with every subject in proportion, in an order that depends on the seed.

    The sample depends only on the items' content and the seed, not on the order of `items`. The sample for a smaller
    count is a prefix of the one for a larger count.
    """
    subjects: dict[str, list[tuple[str, _Sampled]]] = {}
    for item in items:
        key = hashlib.sha256(f"{seed} {item.digest} {item.choices}".encode()).hexdigest()
        subjects.setdefault(item.subject, []).append((key, item))
    ranked = []
    for group in subjects.values():
        group.sort(key=lambda pair: pair[0])
        ranked += [((rank + 0.5) / len(group), key, item) for rank, (key, item) in enumerate(group)]
    ranked.sort(key=lambda entry: entry[:2])
    return tuple(item for _, _, item in ranked[:count])
